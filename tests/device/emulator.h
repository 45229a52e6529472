// Runs CUDA kernels that a C++ compiler made: the threads of a block are fibers of one thread of the host.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <string>

namespace emulator {

constexpr int kWarp = 32;
constexpr size_t kArgumentBytes = 1024;  // what is handed to a kernel; its one struct may be smaller

// Runs one launch; what is wrong with it, or an empty text.
std::string run(const void* kernel, dim3 grid, dim3 block, size_t shared_memory, const void* argument);

// Every launch shuffles its blocks, warps and lanes by this seed and the number of launches since it was set. The first seed is the
// environment variable PEFTOPS_EMULATOR_SEED, else 0.
void set_seed(uint64_t seed);

// Demangled name of a function of any library in the process.
std::string name_of(const void* function);

// For the threads of a kernel: waits until all lanes of the warp have come here, then hands the operands of all to `together`.
void collective(const char* name, void (*together)(void* const (&operands)[kWarp]), void* operands);

// For `together`: ends the launch with an error.
[[noreturn]] void fail(const std::string& text);

// For the threads of a kernel: ends the launch with an error.
void stop(const std::string& text);

// For the threads of a kernel: an asynchronous copy into shared memory, of zeros where `from` is null. By the launch's random order it is
// made at once, or its bytes are poison until the thread waits for it.
void copy_later(void* to, const void* from, size_t bytes);
// Closes a group of the thread's copies.
void commit_copies();
// Makes the copies of all the thread's groups but the last `pending`.
void finish_copies(size_t pending);

// Whether the block's shared memory holds these bytes.
bool in_shared_memory(const void* pointer, size_t bytes);

}  // namespace emulator
