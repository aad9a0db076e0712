// Runs the body of a CUDA kernel on the host, block after block. Every thread of a block is a fiber; they take turns in
// a random order, evenly or with some warps far ahead, changing wherever the device would wait for others. So it finds
// what depends on that order, collectives that not all lanes reach, barriers that some threads skip, accesses outside
// the kernel's buffers, and reads of shared memory that nothing was written to (poison) or that an asynchronous copy
// has not reached yet.
//
// What sm_90a does on its own happens here at some moment between its start and the end of the wait for it: bulk copies
// land in any order, and a warp's products read their registers and shared memory as these are then. B must have been
// brought by bulk copies, for ordinary writes do not reach products without a fence. The grid ahead has ended before this
// one begins, or ends when nothing here can go on without it.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "../csrc/cuda/ptx_sm90.cuh"

namespace sliderquant::cuda {

// That bulk copies have brought to a cluster before the grid ahead ended, at most.
extern "C" {
inline int64_t bytes_ahead_of_grid = 0;
}

class BlockRunner {
 public:
  explicit BlockRunner(uint64_t seed) : seed_(seed), random_(seed) {}

  // Global memory that the kernel may read, or read and write.
  void allow(const void* begin, int64_t bytes, bool write = false) {
    if (begin != nullptr && bytes > 0) buffers_.push_back({static_cast<const char*>(begin), bytes, write, false});
  }

  // The same of what the grid ahead writes: each thread has to wait for that grid before it reads.
  void allow_behind_grid(const void* begin, int64_t bytes) {
    if (begin != nullptr && bytes > 0) buffers_.push_back({static_cast<const char*>(begin), bytes, false, true});
  }

  // body(block, thread, shared) for every thread of every block; the text of the first error, empty if there is none.
  using Body = std::function<void(int64_t block, int thread, char* shared)>;
  // So many blocks at a time form a cluster and run together.
  std::string run(int64_t blocks, int threads, int64_t shared_bytes, const Body& body, int cluster = 1) {
    current_ = this;
    cluster_ = cluster;
    block_threads_ = threads;
    shared_bytes_ = shared_bytes;
    shared_stride_ = (shared_bytes + kRedZone + kAlignment - 1) / kAlignment * kAlignment;
    shared_.resize(static_cast<size_t>(cluster * shared_stride_ + kAlignment));
    const auto address = reinterpret_cast<uintptr_t>(shared_.data());
    first_shared_ = shared_.data() + (kAlignment - address % kAlignment) % kAlignment;
    copied_.resize(static_cast<size_t>(cluster * shared_stride_));
    while (static_cast<int>(fibers_.size()) < cluster * threads) fibers_.push_back(std::make_unique<Fiber>());
    body_ = &body;
    for (block_ = 0; block_ < blocks && error_.empty(); block_ += cluster) run_cluster(cluster * threads);
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
    int& arrived = arrived_[static_cast<size_t>(rank())];
    if (++arrived < block_threads_) {
      wait("sync_threads");
      return;
    }
    arrived = 0;
    for (int i = 0; i < block_threads_; ++i) make_ready(rank() * block_threads_ + i);
  }

  void sync_cluster() {
    if (++arrived_in_cluster_ < threads_) {
      wait("sync_cluster");
      return;
    }
    arrived_in_cluster_ = 0;
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

  void barrier_init(uint64_t* barrier, int arrivals) {
    barriers_[barrier] = {arrivals, arrivals, 0, 0, false, {}};
  }

  // Barriers may be used by others when the thread that made them has fenced.
  void barrier_fence() {
    for (auto& [address, barrier] : barriers_) barrier.fenced = true;
  }

  void barrier_arrive(uint64_t* address, int bytes) {
    Barrier& barrier = known(address);
    if (barrier.pending == 0) fail("one arrival too many at a barrier");
    --barrier.pending;
    barrier.bytes += bytes;
    advance(barrier);
  }

  void barrier_arrive_at(uint64_t* address, int rank) {
    if (rank >= cluster_) fail("block ", rank, " in a cluster of ", cluster_);
    barrier_arrive(there(address, rank), 0);
  }

  void barrier_wait(uint64_t* address, uint32_t parity) {
    Barrier& barrier = known(address);
    while (barrier.phase % 2 == parity) {
      barrier.waiting.push_back(thread_);
      wait("barrier_wait");
    }
  }

  void bulk_copy(void* shared, const void* global, int bytes, uint64_t* barrier) {
    check_shared_range(shared, bytes, 16);
    check_range(global, bytes, 16, false);
    if (bytes <= 0 || bytes % 16 != 0) fail("a bulk copy of ", bytes, " bytes, no positive multiple of 16");
    begin_copy({static_cast<char*>(shared), static_cast<const char*>(global), bytes, barrier});
  }

  void bulk_copy_to_cluster(void* shared, const void* global, int bytes, uint64_t* barrier, int blocks) {
    if (blocks != cluster_) fail("a copy to ", blocks, " blocks in a cluster of ", cluster_);
    check_shared_range(shared, bytes, 16);
    check_range(global, bytes, 16, false);
    for (int rank = 0; rank < blocks; ++rank) {
      begin_copy({there(static_cast<char*>(shared), rank), static_cast<const char*>(global), bytes,
                  there(barrier, rank)});
    }
  }

  void product(const WarpProduct& product) {
    Warp& warp = warps_[static_cast<size_t>(thread_ / kWarp)];
    if (!warp.fenced) fail("a product without a product_fence since the last commit");
    if (product.b >> 62 != 1 || (product.b >> 49 & 7) != 0) fail("a descriptor of another swizzle, or not all lanes'");
    // All warps of a warpgroup make the same products.
    auto& made = groups_[static_cast<size_t>(thread_ / (4 * kWarp))];
    if (warp.products == made.size()) made.push_back(product.b);
    if (made[warp.products++] != product.b) fail("a product of another B than that of its warpgroup");
    warp.open.push_back(product);
    if (random_() % 2 != 0) multiply_all(warp);
  }

  void product_fence() { warps_[static_cast<size_t>(thread_ / kWarp)].fenced = true; }

  void product_commit() {
    Warp& warp = warps_[static_cast<size_t>(thread_ / kWarp)];
    warp.fenced = false;
    warp.committed.push_back(std::move(warp.open));
    warp.open.clear();
  }

  void product_wait(int pending) {
    Warp& warp = warps_[static_cast<size_t>(thread_ / kWarp)];
    while (static_cast<int>(warp.committed.size()) > pending) multiply_first(warp);
  }

  static constexpr uint32_t kFirstAddress = 1024;  // of shared memory, as on the device

  uint32_t shared_address(const void* shared) {
    check_shared(shared, 1);
    return static_cast<uint32_t>(static_cast<const char*>(shared) - shared_begin()) + kFirstAddress;
  }

  const unsigned char* read_copied(uint32_t address, int bytes) {
    const int64_t at = static_cast<int64_t>(address) - kFirstAddress;
    if (at < 0 || at + bytes > shared_bytes_) fail("a product reads shared memory at byte ", at, " of ", shared_bytes_);
    const char* shared = shared_begin(product_rank_) + at;
    const char* copied = copied_.data() + (shared - first_shared_);
    if (std::memcmp(copied, shared, static_cast<size_t>(bytes)) != 0) {
      fail("a product reads byte ", at, " of shared memory, which no bulk copy wrote last");
    }
    return reinterpret_cast<const unsigned char*>(copied);
  }

  void wait_for_grid() {
    if (!grid_ended_) {
      behind_grid_.push_back(thread_);
      wait("wait_for_grid");
    }
    fiber().waited = true;
  }

  void check_global(const void* address, int bytes, bool write) { check_range(address, bytes, bytes, write); }
  void check_shared(const void* address, int bytes) { check_shared_range(address, bytes, bytes); }

  void check_range(const void* address, int bytes, int alignment, bool write) {
    const auto* first = static_cast<const char*>(address);
    if (reinterpret_cast<uintptr_t>(address) % static_cast<uintptr_t>(alignment) != 0) {
      fail(write ? "write" : "read", " of ", bytes, " bytes at the unaligned address ", address);
    }
    for (const Buffer& buffer : buffers_) {
      const bool within = first >= buffer.begin && first + bytes <= buffer.begin + buffer.bytes;
      if (within && buffer.behind_grid && !fiber().waited) fail("read of what the grid ahead may not have written yet");
      if (within && (buffer.write || !write)) return;
    }
    fail(write ? "write" : "read", " of ", bytes, " bytes at ", address, ", outside the buffers of the kernel");
  }

  void check_shared_range(const void* address, int bytes, int alignment) {
    const auto* first = static_cast<const char*>(address);
    const int64_t at = first - shared_begin();
    if (at < 0 || at + bytes > shared_bytes_) fail("access to shared memory at byte ", at, " of ", shared_bytes_);
    if (at % alignment != 0) fail(bytes, " bytes at the unaligned byte ", at, " of shared memory");
  }

 private:
  static constexpr int64_t kRedZone = 256, kAlignment = 1024;
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
    bool waited = false;                    // for the grid ahead
  };

  struct Warp {
    int arrived = 0;
    const char* name = nullptr;
    void (*compute)(void* const*) = nullptr;
    void* operands[kWarp];
    uint64_t haste = 0;
    std::vector<WarpProduct> open;                   // not yet committed
    std::deque<std::vector<WarpProduct>> committed;  // oldest first
    bool fenced = false;
    size_t products = 0;
  };

  struct Barrier {
    int arrivals, pending;  // of a phase, and those that the current one lacks
    int64_t bytes;          // that it lacks
    uint32_t phase;
    bool fenced;
    std::vector<int> waiting;
  };

  struct Bulk {
    char* to;
    const char* from;
    int bytes;
    uint64_t* barrier;
  };

  struct Buffer {
    const char* begin;
    int64_t bytes;
    bool write, behind_grid;
  };

  uint64_t haste(int thread) const { return warps_[static_cast<size_t>(thread / kWarp)].haste; }
  Fiber& fiber() { return *fibers_[static_cast<size_t>(thread_)]; }

  int rank() const { return thread_ / block_threads_; }
  char* shared_begin(int rank) const { return first_shared_ + rank * shared_stride_; }
  char* shared_begin() const { return shared_begin(rank()); }

  // The same place in the shared memory of another block of the cluster.
  template <class T>
  T* there(T* here, int rank) const {
    return reinterpret_cast<T*>(reinterpret_cast<char*>(here) - shared_begin() + shared_begin(rank));
  }

  char* copied(const Bulk& copy) { return copied_.data() + (copy.to - first_shared_); }

  void begin_copy(const Bulk& copy) {
    known(copy.barrier);
    std::memset(copy.to, 0xFF, static_cast<size_t>(copy.bytes));
    std::memset(copied(copy), 0xFF, static_cast<size_t>(copy.bytes));
    bulks_.push_back(copy);
    if (random_() % 2 != 0) land(bulks_.size() - 1);
  }

  Barrier& known(uint64_t* address) {
    const auto found = barriers_.find(address);
    if (found == barriers_.end() || !found->second.fenced) fail("a barrier that is none yet, or was not fenced");
    return found->second;
  }

  void advance(Barrier& barrier) {
    if (barrier.pending > 0 || barrier.bytes != 0) return;
    barrier.pending = barrier.arrivals;
    ++barrier.phase;
    ready_.insert(ready_.end(), barrier.waiting.begin(), barrier.waiting.end());
    barrier.waiting.clear();
  }

  void land(size_t at) {
    const Bulk copy = bulks_[at];
    bulks_.erase(bulks_.begin() + static_cast<std::ptrdiff_t>(at));
    std::memcpy(copy.to, copy.from, static_cast<size_t>(copy.bytes));
    std::memcpy(copied(copy), copy.from, static_cast<size_t>(copy.bytes));
    landed_bytes_ += copy.bytes;
    Barrier& barrier = known(copy.barrier);
    barrier.bytes -= copy.bytes;
    advance(barrier);
  }

  void multiply(const Warp& warp, const std::vector<WarpProduct>& products) {
    product_rank_ = static_cast<int>(&warp - warps_.data()) * kWarp / block_threads_;
    for (const WarpProduct& product : products) product.compute(product);
  }

  void multiply_first(Warp& warp) {
    multiply(warp, warp.committed.front());
    warp.committed.pop_front();
  }

  // The products that a warp has begun, in their order; committed ones keep their place.
  void multiply_all(Warp& warp) {
    for (auto& group : warp.committed) {
      multiply(warp, group);
      group.clear();
    }
    multiply(warp, warp.open);
    warp.open.clear();
  }

  void end_grid() {
    grid_ended_ = true;
    bytes_ahead_of_grid = std::max(bytes_ahead_of_grid, landed_bytes_);
    ready_.swap(behind_grid_);
  }

  // What may happen while threads run: a copy lands, products are computed.
  void progress() {
    if (!bulks_.empty() && random_() % 8 == 0) land(random_() % bulks_.size());
    if (random_() % 64 == 0) multiply_all(warps_[random_() % warps_.size()]);
  }

  void run_cluster(int threads) {
    threads_ = threads;
    arrived_.assign(static_cast<size_t>(cluster_), 0);
    arrived_in_cluster_ = 0;
    std::memset(first_shared_, 0xFF, static_cast<size_t>(cluster_ * shared_stride_));  // NaN as a float
    warps_.assign(static_cast<size_t>((threads + kWarp - 1) / kWarp), {});
    groups_.assign((warps_.size() + 3) / 4, {});
    barriers_.clear();
    bulks_.clear();
    behind_grid_.clear();
    landed_bytes_ = 0;
    grid_ended_ = random_() % 2 != 0;
    std::memset(copied_.data(), 0xFF, copied_.size());
    ready_.clear();
    for (int thread = 0; thread < threads; ++thread) {
      Fiber& fiber = *fibers_[static_cast<size_t>(thread)];
      fiber.waits_at = nullptr;
      fiber.ended = false;
      fiber.open.clear();
      fiber.groups.clear();
      fiber.waited = false;
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
    while (error_.empty()) {
      progress();
      while (ready_.empty() && !bulks_.empty() && error_.empty()) land(random_() % bulks_.size());
      if (ready_.empty() && !grid_ended_) end_grid();
      if (ready_.empty() || !error_.empty()) break;
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
    for (size_t i = 0; i < warps_.size(); ++i) {
      thread_ = static_cast<int>(i) * kWarp;
      if (!warps_[i].open.empty() || !warps_[i].committed.empty()) note("ended without a wait for its products");
      if (warps_[i].products != groups_[i / 4].size()) note("made fewer products than its warpgroup");
    }
    if (!bulks_.empty()) note("ended while a bulk copy had not landed");
    if (!error_.empty()) return;
    for (int64_t i = 0; i < cluster_ * kRedZone; ++i) {
      const int rank = static_cast<int>(i / kRedZone);
      if (shared_begin(rank)[shared_bytes_ + i % kRedZone] == static_cast<char>(0xFF)) continue;
      thread_ = rank * block_threads_;
      note("wrote beyond its ", shared_bytes_, " bytes of shared memory");
      return;
    }
  }

  static void enter() {
    BlockRunner& runner = current();
    const int thread = runner.thread_, rank = runner.rank();
    (*runner.body_)(runner.block_ + rank, thread % runner.block_threads_, runner.shared_begin());
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
    text << "block " << block_ + rank() << ", thread " << thread_ % block_threads_ << " (seed " << seed_ << "): ";
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
  std::vector<char> shared_, copied_;  // copied_: what bulk copies alone have brought
  char* first_shared_ = nullptr;  // of the first block of the cluster
  int64_t shared_bytes_ = 0, shared_stride_ = 0;
  const Body* body_ = nullptr;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<Warp> warps_;
  std::vector<std::vector<uint64_t>> groups_;  // of warps, the descriptors of B that they have met
  std::map<const void*, Barrier> barriers_;
  std::vector<Bulk> bulks_;  // that have not landed
  std::vector<int> ready_, behind_grid_;
  bool grid_ended_ = true;  // the one ahead
  int64_t landed_bytes_ = 0;
  int64_t block_ = 0;
  int cluster_ = 1, block_threads_ = 1, product_rank_ = 0;
  int thread_ = 0, threads_ = 0;  // of the cluster
  std::vector<int> arrived_;      // by the block of the cluster
  int arrived_in_cluster_ = 0;
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

inline void barrier_init(uint64_t* barrier, int arrivals) { BlockRunner::current().barrier_init(barrier, arrivals); }
inline void barrier_fence() { BlockRunner::current().barrier_fence(); }
inline void barrier_arrive(uint64_t* barrier, int bytes) { BlockRunner::current().barrier_arrive(barrier, bytes); }
inline void barrier_wait(uint64_t* barrier, uint32_t parity) { BlockRunner::current().barrier_wait(barrier, parity); }
inline void barrier_arrive_at(uint64_t* barrier, int rank) { BlockRunner::current().barrier_arrive_at(barrier, rank); }
inline void bulk_copy(void* shared, const void* global, int bytes, uint64_t* barrier) {
  BlockRunner::current().bulk_copy(shared, global, bytes, barrier);
}
inline void bulk_copy_to_cluster(void* shared, const void* global, int bytes, uint64_t* barrier, int blocks) {
  BlockRunner::current().bulk_copy_to_cluster(shared, global, bytes, barrier, blocks);
}
inline void sync_cluster() { BlockRunner::current().sync_cluster(); }
inline void product(const WarpProduct& product) { BlockRunner::current().product(product); }
inline void product_fence() { BlockRunner::current().product_fence(); }
inline void product_commit() { BlockRunner::current().product_commit(); }
inline void product_wait(int pending) { BlockRunner::current().product_wait(pending); }
inline uint32_t shared_address(const void* shared) { return BlockRunner::current().shared_address(shared); }
inline const unsigned char* read_copied(uint32_t address, int bytes) {
  return BlockRunner::current().read_copied(address, bytes);
}
inline void wait_for_grid() { BlockRunner::current().wait_for_grid(); }

}  // namespace host

}  // namespace sliderquant::cuda
