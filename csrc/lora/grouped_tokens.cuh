// Tokens by adapter, on the device: a stable counting sort and the lists of what the other kernels of grouped LoRA work on.
#pragma once

#include "grouped_sm80.cuh"

namespace peftops::lora {
namespace sm80 {

PEFTOPS_DEVICE int64_t group_of(const Integers& ids, int64_t token, int64_t adapters) {
  const int64_t id = value_of(ids, token);
  return id == -1 ? adapters + 1 : id < 0 || id >= adapters ? adapters : id;
}

// The sum of the values of the threads before this one; `total` is that of all. Uses 2 * kCount numbers of shared memory.
template <int kCount>
PEFTOPS_DEVICE uint64_t sum_before(uint64_t value, uint64_t& total) {
  auto* sums = reinterpret_cast<uint64_t*>(shared_memory);
  uint64_t sum = value;
  int half = 0;
  sums[thread()] = sum;
  __syncthreads();
#pragma unroll 1
  for (int step = 1; step < kCount; step *= 2, half ^= kCount) {
    if (thread() >= step) sum += sums[half + thread() - step];
    sums[(half ^ kCount) + thread()] = sum;
    __syncthreads();
  }
  total = sums[half + kCount - 1];
  return sum - value;
}

// Each thread has tokens that follow one another. Templates, so that the one file that names them has them.
template <class Index>
__global__ void __launch_bounds__(kGroupThreads) group_tokens(const __grid_constant__ GroupTask task) {
  const int64_t group = blockIdx.x, begin = min_of(thread() * task.rows_per_thread, task.rows);
  const int64_t end = min_of(begin + task.rows_per_thread, task.rows);
  uint32_t less = 0, mine = 0;
#pragma unroll 4  // loads that do not wait for each other
  for (int64_t token = begin; token < end; ++token) {
    const int64_t other = group_of(task.ids, token, task.adapters);
    less += other < group, mine += other == group;
  }
  uint64_t total;
  const uint64_t before = sum_before<kGroupThreads>(static_cast<uint64_t>(less) << 32 | mine, total);
  const int64_t first = static_cast<int64_t>(total >> 32);
  Index* to = task.order + first + static_cast<uint32_t>(before);
  if (mine)
    for (int64_t token = begin; token < end; ++token)
      if (group_of(task.ids, token, task.adapters) == group) *to++ = static_cast<Index>(token);
  if (thread() == 0) {
    task.starts[group] = static_cast<Index>(first);
    if (group == task.adapters + 1) task.starts[group + 1] = static_cast<Index>(task.rows);
  }
}

template <class Index>
__global__ void __launch_bounds__(kListThreads) list_tiles(const __grid_constant__ ListTask task) {
  const int64_t groups = task.adapters + 2, begin = min_of(thread() * task.groups_per_thread, groups);
  const int64_t end = min_of(begin + task.groups_per_thread, groups);
  const auto parts_of = [&](Index count) { return count == 0 ? 1 : (count - 1) / task.rows_per_part + 1; };
  uint32_t tiles = 0, parts = 0;
  for (int64_t group = begin; group < end; ++group) {
    const Index count = task.starts[group + 1] - task.starts[group];
    tiles += (count + kTile - 1) / kTile;
    if (task.parts && group < task.adapters) parts += parts_of(count);
  }
  uint64_t total;
  const uint64_t before = sum_before<kListThreads>(static_cast<uint64_t>(parts) << 32 | tiles, total);
  int64_t tile = static_cast<uint32_t>(before), part = static_cast<int64_t>(before >> 32);
  for (int64_t group = begin; group < end; ++group) {
    const Index first = task.starts[group], next = task.starts[group + 1];
    for (Index at = first; at < next; at += kTile)
      task.tiles[tile++] = {static_cast<Index>(group), at, static_cast<Index>(min_of(next - at, kTile)), 0};
    if (!task.parts || group >= task.adapters) continue;
    const Index count = parts_of(next - first);
    task.ranges[group] = {static_cast<Index>(part), count};
    for (Index i = 0; i < count; ++i) {
      const int64_t at = first + int64_t{i} * task.rows_per_part;
      task.parts[part++] = {static_cast<Index>(group), static_cast<Index>(at), static_cast<Index>(min_of(next - at, task.rows_per_part)),
                            count};
    }
  }
  for (int64_t i = static_cast<uint32_t>(total) + thread(); i < task.tile_slots; i += kListThreads) task.tiles[i] = {0, 0, 0, 0};
  if (task.parts)
    for (int64_t i = static_cast<int64_t>(total >> 32) + thread(); i < task.part_slots; i += kListThreads) task.parts[i] = {-1, 0, 0, 0};
}

// A thread for each token.
template <class Index>
__global__ void __launch_bounds__(kGroupThreads) group_few_tokens(const __grid_constant__ GroupFewTask task) {
  auto* const groups = reinterpret_cast<Index*>(shared_memory);
  auto* const tiles = groups + kGroupThreads;  // of a group, at its first token
  const int rows = static_cast<int>(task.rows), token = thread();
  const Index group = token < rows ? static_cast<Index>(group_of(task.ids, token, task.adapters)) : 0;
  groups[token] = group;
  __syncthreads();
  int less = 0, before = 0, count = 0;
#pragma unroll 4
  for (int other = 0; other < rows; ++other) {
    const Index its = groups[other];
    less += its < group, count += its == group, before += its == group && other < token;
  }
  tiles[token] = token < rows && before == 0 ? (count + task.tile_rows - 1) / task.tile_rows : 0;
  __syncthreads();
  int tile = 0, total = 0;
#pragma unroll 4
  for (int other = 0; other < rows; ++other) {
    tile += groups[other] < group ? tiles[other] : 0;
    total += tiles[other];
  }
  if (token < rows) {
    task.order[less + before] = token;
    if (before % task.tile_rows == 0)
      task.tiles[tile + before / task.tile_rows] = {group, less + before, static_cast<Index>(min_of(count - before, task.tile_rows)), 0};
  }
  for (int64_t i = total + token; i < task.tile_slots; i += kGroupThreads) task.tiles[i] = {0, 0, 0, 0};
}

}  // namespace sm80
}  // namespace peftops::lora
