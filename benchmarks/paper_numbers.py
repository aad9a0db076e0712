"""The figures of tables 1 to 4 of SliderQuant (Wang et al., ICLR 2026), as they are printed there.

Source: arXiv 2603.25284, version 1, HTML: tables 1 and 2 (methods without extra cost at inference: perplexity;
zero-shot accuracy in percent), 3 (with extra cost; SliderQuant+ has online rotations) and 4 (Qwen3-30B-A3B). Nothing
is rounded, filled in or mended: "-" and "NAN" are the paper's, and so is the C4 perplexity of Llama2-13B in 16 bits,
6.46 in table 1 and 5.46 in table 3.
"""

from __future__ import annotations

from typing import NamedTuple

TABLES = """
table 1 Llama2-7B: WikiText2 C4
W16A16 - 5.47 6.97
W4A16 RTN 6.11 7.71
W4A16 AWQ 6.15 7.68
W4A16 GPTQ 5.83 7.37
W4A16 OmniQuant 5.74 7.35
W4A16 CBQ 5.67 7.23
W4A16 SliderQuant 5.61 7.19
W2A16 RTN 3.8e4 4.8e4
W2A16 AWQ 2.2e5 1.7e5
W2A16 GPTQ 7.7e3 NAN
W2A16 QuIP 55.00 -
W2A16 OmniQuant 37.37 90.64
W2A16 CBQ 12.10 18.91
W2A16 SliderQuant 9.59 13.83
W4A4 RTN 5.3e2 5.4e2
W4A4 SmoothQuant 83.12 77.27
W4A4 OmniQuant 14.26 18.02
W4A4 AffineQuant 12.69 15.76
W4A4 CBQ 12.73 14.45
W4A4 SliderQuant 8.34 11.10
table 1 Llama2-13B: WikiText2 C4
W16A16 - 4.88 6.46
W4A16 RTN 5.20 6.83
W4A16 AWQ 5.12 6.74
W4A16 GPTQ 5.13 6.70
W4A16 OmniQuant 5.02 6.65
W4A16 CBQ 5.02 6.67
W4A16 SliderQuant 5.00 6.54
W2A16 RTN 5.6e4 7.2e4
W2A16 AWQ 1.2e5 9.4e4
W2A16 GPTQ 2.1e3 3.2e2
W2A16 QuIP 13.75 -
W2A16 OmniQuant 17.21 26.76
W2A16 CBQ 9.32 21.93
W2A16 SliderQuant 7.71 11.21
W4A4 RTN 5.8e2 5.3e2
W4A4 SmoothQuant 46.62 43.19
W4A4 OmniQuant 12.30 14.55
W4A4 AffineQuant 11.45 13.97
W4A4 CBQ 8.48 11.71
W4A4 SliderQuant 7.62 10.26
table 1 Llama2-70B: WikiText2 C4
W16A16 - 3.33 5.54
W4A16 RTN 3.67 5.79
W4A16 AWQ 3.60 5.70
W4A16 GPTQ 3.58 5.67
W4A16 OmniQuant 3.47 5.65
W4A16 CBQ 3.46 5.64
W4A16 SliderQuant 3.41 5.60
W2A16 RTN 2.0e4 2.4e4
W2A16 AWQ 9.1e1 5.1e1
W2A16 GPTQ 77.95 48.82
W2A16 QuIP 6.96 -
W2A16 OmniQuant 7.81 12.28
W2A16 CBQ 7.23 11.34
W2A16 SliderQuant 6.53 9.59
W4A4 RTN 8.9e4 9.9e4
W4A4 SmoothQuant 33.40 43.28
W4A4 OmniQuant 11.54 13.72
W4A4 AffineQuant - -
W4A4 CBQ 7.56 11.04
W4A4 SliderQuant 6.87 9.67
table 1 Llama3-8B: WikiText2 C4
W16A16 - 6.13 8.93
W4A16 RTN 8.29 11.85
W4A16 AWQ 8.09 11.23
W4A16 GPTQ 8.01 11.34
W4A16 OmniQuant 7.28 10.59
W4A16 CBQ 6.93 10.27
W4A16 SliderQuant 6.79 9.94
W2A16 RTN 2.4e6 2.5e6
W2A16 AWQ 5.6e5 3.1e5
W2A16 GPTQ 7.8e5 9.7e5
W2A16 QuIP 1.2e3 -
W2A16 OmniQuant 2.8e5 3.9e5
W2A16 CBQ 91.83 404.31
W2A16 SliderQuant 27.59 56.98
W4A4 RTN 2.3e2 2.0e2
W4A4 SmoothQuant 2.0e2 1.5e2
W4A4 OmniQuant 1.5e2 1.4e2
W4A4 AffineQuant 2.1e3 3.5e3
W4A4 CBQ 35.97 32.64
W4A4 SliderQuant 15.47 21.74
table 1 Qwen2.5-7B: WikiText2 C4
W16A16 - 7.73 11.55
W4A16 RTN 10.39 14.83
W4A16 AWQ 8.54 12.78
W4A16 GPTQ 8.64 12.98
W4A16 OmniQuant 8.23 12.25
W4A16 CBQ 7.92 11.77
W4A16 SliderQuant 7.81 11.59
W2A16 RTN 6.9e4 6.9e4
W2A16 AWQ 1.5e2 2.7e2
W2A16 GPTQ 1.2e2 3.1e2
W2A16 QuIP - -
W2A16 OmniQuant 56.45 89.13
W2A16 CBQ 18.65 37.10
W2A16 SliderQuant 17.15 31.08
W4A4 RTN 3.6e5 3.7e5
W4A4 SmoothQuant 1.3e2 2.9e2
W4A4 OmniQuant 93.73 2.9e2
W4A4 AffineQuant - -
W4A4 CBQ 35.00 72.09
W4A4 SliderQuant 13.81 21.52
table 1 Qwen2.5-14B: WikiText2 C4
W16A16 - 5.30 9.11
W4A16 RTN 6.78 10.35
W4A16 AWQ 6.43 9.89
W4A16 GPTQ 6.45 10.01
W4A16 OmniQuant 5.94 9.67
W4A16 CBQ 5.83 9.54
W4A16 SliderQuant 5.80 9.53
W2A16 RTN 6.0e6 4.4e6
W2A16 AWQ 1.4e3 2.7e3
W2A16 GPTQ 1.2e3 1.3e3
W2A16 QuIP - -
W2A16 OmniQuant 67.84 89.56
W2A16 CBQ 13.65 25.55
W2A16 SliderQuant 12.68 21.91
W4A4 RTN 4.0e3 3.0e3
W4A4 SmoothQuant 1.3e2 1.4e2
W4A4 OmniQuant 34.70 61.75
W4A4 AffineQuant - -
W4A4 CBQ 18.20 27.96
W4A4 SliderQuant 11.00 16.60
table 2 Llama2-13B: PIQA ARC-e ARC-c HS WG BoolQ MMLU Avg
W16A16 - 80.41 77.40 49.15 79.37 72.14 80.55 52.77 70.26
W4A4 SmoothQuant 61.10 44.87 27.47 41.03 50.67 58.50 21.14 43.54
W4A4 OmniQuant 69.21 57.37 34.56 61.95 56.91 65.44 23.56 52.71
W4A4 CBQ 71.00 61.57 35.84 65.15 57.93 66.39 24.78 54.67
W4A4 SliderQuant 71.65 62.88 37.80 66.02 60.77 71.22 27.04 56.77
table 2 Qwen2.5-14B: PIQA ARC-e ARC-c HS WG BoolQ MMLU Avg
W16A16 - 82.10 79.59 58.87 82.95 75.61 85.26 77.58 77.42
W4A4 SmoothQuant 54.57 35.14 24.66 35.29 51.46 56.45 24.90 40.35
W4A4 OmniQuant 59.45 48.56 30.16 61.42 54.23 58.34 27.68 48.55
W4A4 CBQ 67.52 60.86 36.18 60.12 58.09 60.15 31.61 53.50
W4A4 SliderQuant 71.16 66.96 40.96 63.38 62.51 64.25 43.50 58.96
table 3 Llama2-7B: WikiText2 C4 PIQA ARC-e ARC-c HS WG Avg
W16A16 - 5.47 6.97 78.84 74.62 46.42 75.90 69.46 69.05
W4A4 QLLM 11.75 13.26 67.68 44.40 30.89 58.45 56.59 51.60
W4A4 Atom 6.96 9.12 69.75 47.35 34.22 63.21 56.51 54.21
W4A4 DuQuant 6.08 7.79 75.68 50.00 37.46 69.74 63.93 59.36
W4A4 QuaRot 6.10 8.69 76.77 69.87 40.87 72.16 63.77 64.69
W4A4 SpinQuant 5.96 8.28 76.17 69.28 41.72 72.90 66.06 65.23
W4A4 FlatQuant 5.79 7.79 77.26 72.05 43.26 73.64 69.53 67.15
W4A4 SliderQuant+ 5.71 7.68 77.97 73.15 43.35 73.71 69.74 67.58
table 3 Llama2-13B: WikiText2 C4 PIQA ARC-e ARC-c HS WG Avg
W16A16 - 4.88 5.46 80.41 77.40 49.15 79.37 72.14 71.69
W4A4 QLLM 9.09 11.13 70.46 48.48 34.39 62.80 55.41 54.31
W4A4 Atom 6.96 9.12 71.16 50.89 37.88 67.51 58.40 57.17
W4A4 DuQuant 5.33 7.02 77.26 56.23 42.15 73.68 65.43 62.95
W4A4 QuaRot 6.10 8.67 77.69 69.95 42.83 73.54 67.88 66.38
W4A4 SpinQuant 5.44 8.11 78.40 72.43 43.69 75.52 68.90 67.79
W4A4 FlatQuant 5.12 7.09 79.38 76.64 48.04 77.59 70.24 70.38
W4A4 SliderQuant+ 5.07 7.04 79.96 77.27 48.95 77.96 71.98 71.22
table 3 Llama2-70B: WikiText2 C4 PIQA ARC-e ARC-c HS WG Avg
W16A16 - 3.32 5.71 82.70 81.02 57.17 83.81 77.98 76.54
W4A4 QuaRot 3.79 6.12 81.83 79.76 55.46 81.58 76.09 74.94
W4A4 SpinQuant 3.70 6.07 82.37 79.04 55.38 82.57 78.22 75.52
W4A4 FlatQuant 3.55 5.91 82.75 80.30 56.14 83.01 77.90 76.02
W4A4 SliderQuant+ 3.50 5.87 82.75 81.23 56.57 83.12 77.93 76.32
table 3 Llama3-8B: WikiText2 C4 PIQA ARC-e ARC-c HS WG Avg
W16A16 - 6.13 8.93 80.79 77.69 53.41 79.13 72.77 72.76
W4A4 Atom 22.14 31.83 62.95 49.45 30.12 53.75 56.04 50.46
W4A4 DuQuant 8.06 11.29 76.22 70.41 43.69 73.87 67.80 66.40
W4A4 QuaRot 8.16 13.38 75.14 68.01 43.34 72.94 65.82 65.05
W4A4 SpinQuant 7.39 12.19 77.37 74.20 47.27 74.55 68.51 68.38
W4A4 FlatQuant 6.98 11.13 79.16 75.80 50.00 76.80 72.69 70.89
W4A4 SliderQuant+ 6.87 11.04 79.22 77.53 50.60 77.31 72.82 71.50
table 3 Qwen2.5-7B-Instruct: WikiText2 C4 PIQA ARC-e ARC-c HS WG Avg
W16A16 - 8.36 14.37 80.20 75.80 51.37 79.57 69.93 71.37
W4A4 FlatQuant 8.46 13.94 76.93 77.69 51.71 78.42 69.53 70.86
W4A4 SliderQuant+ 8.00 13.38 79.56 79.05 52.27 78.66 69.88 71.88
table 4 Qwen3-30B-A3B: WikiText2 C4 PIQA ARC-e ARC-c HS WG BoolQ MMLU Avg
W16A16 - 8.71 12.08 80.14 79.25 56.23 77.66 69.93 88.56 77.74 75.64
W4A16 OmniQuant 9.25 12.54 79.43 77.23 52.22 76.36 69.46 87.68 76.21 74.08
W4A16 SliderQuant 9.04 12.47 79.87 77.44 55.20 76.75 70.96 87.92 76.83 75.00
W3A16 OmniQuant 10.27 13.52 79.00 76.73 52.73 74.77 67.25 86.94 73.63 73.01
W3A16 SliderQuant 9.92 13.32 80.20 79.00 54.61 74.80 70.48 87.61 74.63 74.48
W2A16 OmniQuant 33.25 27.12 70.78 54.97 34.04 56.59 54.46 69.63 32.67 53.31
W2A16 SliderQuant 23.84 21.60 72.36 67.51 40.53 60.79 62.04 77.61 47.19 61.15
W4A4 OmniQuant 52.43 41.98 67.41 55.64 33.28 52.34 52.09 64.86 25.17 50.11
W4A4 SliderQuant 15.49 17.77 75.52 70.79 46.67 68.82 63.14 82.26 60.80 66.86
"""


class Entry(NamedTuple):
    """One figure of the paper."""

    table: int
    model: str
    scheme: str
    method: str  # "-" of the 16-bit model
    column: str
    printed: str

    @property
    def value(self) -> float | None:
        """None where the paper has no figure."""
        return None if self.printed in ("-", "NAN") else float(self.printed)


def entries() -> list[Entry]:
    """All figures, in the order of the paper's tables, model by model."""
    found = []
    for line in TABLES.strip().splitlines():
        if line.startswith("table "):
            heading, _, names = line.partition(": ")
            _, table, model = heading.split()
            columns = names.split()
            continue
        scheme, method, *printed = line.split()
        found += [Entry(int(table), model, scheme, method, *each) for each in zip(columns, printed, strict=True)]
    return found
