#include "buffer.h"

#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <mutex>
#include <new>
#include <vector>

namespace ribfast::cpu {
namespace {

constexpr int64_t kUnit = 4096;

struct Block {
  void* memory;
  int64_t size;
};

struct Pool {
  std::mutex mutex;
  std::vector<Block> blocks;  // the oldest first
  int64_t bytes = 0;
  const int64_t most = std::min(kKeptBytes, int64_t{sysconf(_SC_PHYS_PAGES)} * sysconf(_SC_PAGESIZE) / 32);
};

Pool& pool() {
  static Pool* const shared = new Pool;  // outlives every static object that may hold a Buffer
  return *shared;
}

}  // namespace

void* take_memory(int64_t bytes, int64_t& size) {
  size = (bytes + kUnit - 1) / kUnit * kUnit + kUnit;
  {
    Pool& shared = pool();
    const std::lock_guard<std::mutex> lock(shared.mutex);
    size_t best = shared.blocks.size();
    for (size_t i = 0; i < shared.blocks.size(); ++i) {
      const int64_t has = shared.blocks[i].size;
      if (has >= bytes && has <= 2 * size && (best == shared.blocks.size() || has < shared.blocks[best].size)) best = i;
    }
    if (best < shared.blocks.size()) {
      const Block block = shared.blocks[best];
      shared.blocks.erase(shared.blocks.begin() + static_cast<ptrdiff_t>(best));
      shared.bytes -= block.size;
      size = block.size;
      return block.memory;
    }
  }
  void* memory = std::aligned_alloc(kUnit, static_cast<size_t>(size));
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}

void give_memory(void* memory, int64_t size) {
  std::vector<void*> dropped;
  {
    Pool& shared = pool();
    const std::lock_guard<std::mutex> lock(shared.mutex);
    if (size > shared.most) {
      dropped.push_back(memory);
    } else {
      shared.blocks.push_back({memory, size});
      shared.bytes += size;
    }
    while (shared.bytes > shared.most) {
      dropped.push_back(shared.blocks.front().memory);
      shared.bytes -= shared.blocks.front().size;
      shared.blocks.erase(shared.blocks.begin());
    }
  }
  for (void* old : dropped) std::free(old);
}

}  // namespace ribfast::cpu
