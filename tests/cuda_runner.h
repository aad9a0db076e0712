// Runs the body of a CUDA kernel on the host, block after block. Every thread of a block is a fiber; they take turns in
// a random order, evenly or with some warps far ahead, changing wherever the device would wait for others. So it finds
// what depends on that order, collectives that not all lanes reach, barriers that some threads skip, accesses outside
// the kernel's buffers, and reads of shared memory that nothing was written to (poison) or that an asynchronous copy
// has not reached yet.
#pragma once

#include <ucontext.h>

#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "../csrc/cuda/ptx.cuh"

namespace sliderquant::cuda {

class BlockRunner {
 public:
  explicit BlockRunner(uint64_t seed) : seed_(seed), random_(seed) {}

  // Global memory that the kernel may read, or read and write.
  void allow(const void* begin, int64_t bytes, bool write = false) {
    if (begin != nullptr && bytes > 0) buffers_.push_back({static_cast<const char*>(begin), bytes, write});
  }

  // body(block, thread, shared) for every thread of every block; the text of the first error, empty if there is none.
  using Body = std::function<void(int64_t block, int thread, char* shared)>;
  std::string run(int64_t blocks, int threads, int64_t shared_bytes, const Body& body) {
    current_ = this;
    shared_bytes_ = shared_bytes;
    shared_.resize(static_cast<size_t>(shared_bytes + kRedZone + kAlignment));
    const auto address = reinterpret_cast<uintptr_t>(shared_.data());
    shared_begin_ = shared_.data() + (kAlignment - address % kAlignment) % kAlignment;
    while (static_cast<int>(fibers_.size()) < threads) fibers_.push_back(std::make_unique<Fiber>());
    body_ = &body;
    for (block_ = 0; block_ < blocks && error_.empty(); ++block_) run_block(threads);
    current_ = nullptr;
    return error_;
  }

  static BlockRunner& current() { return *current_; }

  int lane() const { return thread_ % kWarp; }

  void warp_collective(const char* name, void* operands, void (*compute)(void* const*)) {
    Warp& warp = warps_[static_cast<size_t>(thread_ / kWarp)];
    if (warp.arrived > 0 && (warp.name != name || warp.compute != compute)) {
      fail("lane ", lane(), " is at ", name, " while others of its warp are at ", warp.name);
    }
    warp.name = name;
    warp.compute = compute;
    warp.operands[lane()] = operands;
    if (++warp.arrived < kWarp) {
      wait(name);
      return;
    }
    compute(warp.operands);
    warp.arrived = 0;
    for (int i = 0; i < kWarp; ++i) make_ready(thread_ / kWarp * kWarp + i);
  }

  void sync_threads() {
    if (++arrived_ < threads_) {
      wait("sync_threads");
      return;
    }
    arrived_ = 0;
    for (int thread = 0; thread < threads_; ++thread) make_ready(thread);
  }

  void cp_async(void* shared, const void* global, bool exists) {
    Copy copy = {static_cast<char*>(shared), exists ? static_cast<const char*>(global) : nullptr};
    // The device may copy at once or as late as the wait allows.
    if (random_() % 2 != 0) {
      std::memset(copy.to, 0xFF, kCopyBytes);
      fiber().open.push_back(copy);
    } else {
      copy.apply();
    }
  }

  void cp_async_commit() {
    fiber().groups.push_back(std::move(fiber().open));
    fiber().open.clear();
  }

  void cp_async_wait(int pending) {
    auto& groups = fiber().groups;
    while (static_cast<int>(groups.size()) > pending) {
      for (const Copy& copy : groups.front()) copy.apply();
      groups.erase(groups.begin());
    }
  }

  void check_global(const void* address, int bytes, bool write) {
    const auto* first = static_cast<const char*>(address);
    if (reinterpret_cast<uintptr_t>(address) % static_cast<uintptr_t>(bytes) != 0) {
      fail(write ? "write" : "read", " of ", bytes, " bytes at the unaligned address ", address);
    }
    for (const Buffer& buffer : buffers_) {
      if (first >= buffer.begin && first + bytes <= buffer.begin + buffer.bytes && (buffer.write || !write)) return;
    }
    fail(write ? "write" : "read", " of ", bytes, " bytes at ", address, ", outside the buffers of the kernel");
  }

  void check_shared(const void* address, int bytes) {
    const auto* first = static_cast<const char*>(address);
    if (first < shared_begin_ || first + bytes > shared_begin_ + shared_bytes_) {
      fail("access to shared memory at byte ", first - shared_begin_, " of ", shared_bytes_);
    }
    if ((first - shared_begin_) % bytes != 0) {
      fail(bytes, " bytes at the unaligned byte ", first - shared_begin_, " of shared memory");
    }
  }

 private:
  static constexpr int64_t kRedZone = 256, kAlignment = 128;
  static constexpr size_t kStackBytes = 64 << 10;
  static constexpr int kCopyBytes = 16;

  struct Copy {
    char* to;
    const char* from;  // null: zeros
    void apply() const {
      if (from != nullptr) {
        std::memcpy(to, from, kCopyBytes);
      } else {
        std::memset(to, 0, kCopyBytes);
      }
    }
  };

  struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack{new char[kStackBytes]};
    const char* waits_at = nullptr;
    bool ended = false;
    std::vector<Copy> open;                 // not yet committed
    std::vector<std::vector<Copy>> groups;  // committed, oldest first
  };

  struct Warp {
    int arrived = 0;
    const char* name = nullptr;
    void (*compute)(void* const*) = nullptr;
    void* operands[kWarp];
    uint64_t haste = 0;
  };

  struct Buffer {
    const char* begin;
    int64_t bytes;
    bool write;
  };

  uint64_t haste(int thread) const { return warps_[static_cast<size_t>(thread / kWarp)].haste; }
  Fiber& fiber() { return *fibers_[static_cast<size_t>(thread_)]; }

  void run_block(int threads) {
    threads_ = threads;
    arrived_ = 0;
    std::memset(shared_begin_, 0xFF, static_cast<size_t>(shared_bytes_ + kRedZone));  // NaN as a float
    warps_.assign(static_cast<size_t>((threads + kWarp - 1) / kWarp), {});
    ready_.clear();
    for (int thread = 0; thread < threads; ++thread) {
      Fiber& fiber = *fibers_[static_cast<size_t>(thread)];
      fiber.waits_at = nullptr;
      fiber.ended = false;
      fiber.open.clear();
      fiber.groups.clear();
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.get();
      fiber.context.uc_stack.ss_size = kStackBytes;
      fiber.context.uc_link = nullptr;
      makecontext(&fiber.context, &BlockRunner::enter, 0);
      ready_.push_back(thread);
    }
    // In half of the blocks all threads advance evenly, in the others some warps run far ahead.
    const int draws = random_() % 2 != 0 ? 1 : 16;
    for (Warp& warp : warps_) warp.haste = random_();
    while (!ready_.empty() && error_.empty()) {
      size_t at = random_() % ready_.size();
      for (int draw = 1; draw < draws; ++draw) {
        const size_t other = random_() % ready_.size();
        if (haste(ready_[other]) > haste(ready_[at])) at = other;
      }
      thread_ = ready_[at];
      ready_[at] = ready_.back();
      ready_.pop_back();
      swapcontext(&scheduler_, &fiber().context);
    }
    if (!error_.empty()) return;
    for (int thread = 0; thread < threads; ++thread) {
      if (fibers_[static_cast<size_t>(thread)]->ended) continue;
      int ended = 0;
      for (int other = 0; other < threads; ++other) ended += fibers_[static_cast<size_t>(other)]->ended;
      thread_ = thread;
      note("waits forever at ", fiber().waits_at, "; ", ended, " of ", threads, " threads have ended");
      return;
    }
    for (int64_t i = 0; i < kRedZone; ++i) {
      if (shared_begin_[shared_bytes_ + i] == static_cast<char>(0xFF)) continue;
      note("wrote beyond its ", shared_bytes_, " bytes of shared memory");
      return;
    }
  }

  static void enter() {
    BlockRunner& runner = current();
    (*runner.body_)(runner.block_, runner.thread_, runner.shared_begin_);
    runner.fiber().ended = true;
    setcontext(&runner.scheduler_);
  }

  void wait(const char* name) {
    Fiber& self = fiber();
    self.waits_at = name;
    swapcontext(&self.context, &scheduler_);
  }

  void make_ready(int thread) {
    if (thread != thread_) ready_.push_back(thread);
  }

  template <class... Parts>
  void note(const Parts&... parts) {
    std::ostringstream text;
    text << "block " << block_ << ", thread " << thread_ << " (seed " << seed_ << "): ";
    (text << ... << parts);
    if (error_.empty()) error_ = text.str();
  }

  template <class... Parts>
  void fail(const Parts&... parts) {
    note(parts...);
    setcontext(&scheduler_);
  }

  static inline BlockRunner* current_ = nullptr;
  uint64_t seed_;
  std::minstd_rand random_;
  std::vector<Buffer> buffers_;
  std::vector<char> shared_;
  char* shared_begin_ = nullptr;
  int64_t shared_bytes_ = 0;
  const Body* body_ = nullptr;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<Warp> warps_;
  std::vector<int> ready_;
  int64_t block_ = 0;
  int thread_ = 0, threads_ = 0, arrived_ = 0;
  std::string error_;
  ucontext_t scheduler_;
};

namespace host {

inline void warp_collective(const char* name, void* operands, void (*compute)(void* const*)) {
  BlockRunner::current().warp_collective(name, operands, compute);
}
inline void sync_threads() { BlockRunner::current().sync_threads(); }
inline void cp_async(void* shared, const void* global, bool exists) {
  BlockRunner::current().cp_async(shared, global, exists);
}
inline void cp_async_commit() { BlockRunner::current().cp_async_commit(); }
inline void cp_async_wait(int pending) { BlockRunner::current().cp_async_wait(pending); }
inline int lane() { return BlockRunner::current().lane(); }
inline void check_global(const void* address, int bytes, bool write) {
  BlockRunner::current().check_global(address, bytes, write);
}
inline void check_shared(const void* address, int bytes) { BlockRunner::current().check_shared(address, bytes); }

}  // namespace host

}  // namespace sliderquant::cuda
