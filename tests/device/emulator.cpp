#include "emulator.h"

#include <csignal>
#include <cstdlib>
#include <cstring>

#include <algorithm>
#include <memory>
#include <mutex>
#include <numeric>
#include <utility>
#include <vector>

#include <cxxabi.h>
#include <dlfcn.h>
#include <elf.h>
#include <fcntl.h>
#include <pthread.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <ucontext.h>
#include <unistd.h>

#ifndef __x86_64__
#error "fibers are written for x86-64"
#endif

// What CUDA's headers promise to kernels. Const for them: within one thread they are.
extern "C" {
uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;
}
unsigned char* shared_memory;

// Leaves the running fiber, whose registers and stack pointer are kept in *from, for the one that was left with `to`. It returns by a
// jump, because a processor expects `ret` to go back to the last call.
extern "C" __attribute__((visibility("hidden"))) void switch_fiber(void** from, void* to);
asm(R"(
  .text
  .hidden switch_fiber
  .globl switch_fiber
switch_fiber:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  popq %rcx
  jmp *%rcx
)");

namespace emulator {
namespace {

constexpr size_t kPage = 4096;
constexpr size_t kStack = 96 * 1024;
constexpr size_t kMaxShared = 228 * 1024;
constexpr size_t kMaxThreads = 1024;
constexpr unsigned char kPoison = 0xff;  // a NaN in every float format
constexpr size_t kSharedAlignment = 128;

enum class State { ready, at_collective, at_barrier, finished, faulted };

struct Copy {
  void* to;
  const void* from;  // nullptr: zeros
  size_t bytes, group;
};

struct Fiber {
  void* stack_pointer;
  uint3 index;
  State state;
  const char* name;  // of the collective
  void (*together)(void* const (&)[kWarp]);
  void* operands;
  std::vector<Copy> copies;  // on their way
  size_t groups;             // committed
};

// Passed by value it lies on the stack, as any struct of more than 16 bytes, so a kernel finds its own struct at the start.
struct Argument {
  unsigned char bytes[kArgumentBytes];
};

// Memory of whole pages, with one that cannot be touched at each end.
class Guarded {
 public:
  explicit Guarded(size_t bytes) : bytes_(bytes) {
    auto* all =
        static_cast<unsigned char*>(mmap(nullptr, bytes + 2 * kPage, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (all == MAP_FAILED || mprotect(all + kPage, bytes, PROT_READ | PROT_WRITE) != 0) std::abort();
    begin_ = all + kPage;
  }
  unsigned char* begin() const { return begin_; }
  unsigned char* end() const { return begin_ + bytes_; }

 private:
  size_t bytes_;
  unsigned char* begin_;
};

// splitmix64 (Steele, Lea, Flood 2014).
struct Random {
  using result_type = uint64_t;
  static constexpr uint64_t min() { return 0; }
  static constexpr uint64_t max() { return ~uint64_t{0}; }
  uint64_t state;
  uint64_t operator()() {
    uint64_t z = (state += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
};

struct Failure {
  std::string text;
};

std::mutex one_launch;  // the variables below belong to the launch that runs
uint64_t seed = std::getenv("PEFTOPS_EMULATOR_SEED") ? std::strtoull(std::getenv("PEFTOPS_EMULATOR_SEED"), nullptr, 0) : 0;
uint64_t launches = 0;

const void* kernel;
Argument argument;
size_t shared_bytes;
std::vector<Fiber> fibers;
Fiber* running = nullptr;
void* scheduler;  // its stack pointer while a fiber runs
Random* order;         // of the launch
std::string stopped;   // by stop(): why
int fault_signal;
const unsigned char* fault_address;
pthread_t owner;

const Guarded& stack_of(size_t thread) {
  static std::vector<Guarded> stacks;
  while (stacks.size() <= thread) stacks.emplace_back(kStack);
  return stacks[thread];
}

std::string text_of(uint3 at) { return "(" + std::to_string(at.x) + ", " + std::to_string(at.y) + ", " + std::to_string(at.z) + ")"; }

std::string where(const Fiber& fiber) { return "block " + text_of(blockIdx) + ", thread " + text_of(fiber.index); }

std::string doing(const Fiber& fiber) {
  switch (fiber.state) {
    case State::finished: return "has returned";
    case State::at_barrier: return "waits at __syncthreads";
    case State::at_collective: return std::string("waits at ") + fiber.name;
    default: return "runs";
  }
}

void yield(State state) {
  running->state = state;
  switch_fiber(&running->stack_pointer, scheduler);
}

void body() {
  reinterpret_cast<void (*)(Argument)>(const_cast<void*>(kernel))(argument);
  yield(State::finished);
}

std::string describe_fault(const Fiber& fiber);

void resume(Fiber& fiber) {
  running = &fiber;
  threadIdx = fiber.index;
  switch_fiber(&scheduler, fiber.stack_pointer);
  running = nullptr;
  if (fiber.state == State::faulted) throw Failure{where(fiber) + ": " + describe_fault(fiber)};
}

void start(Fiber& fiber, size_t thread) {
  // Stacks that all begin at the same offset of a page would share the same few lines of the first cache.
  auto* top = reinterpret_cast<void**>(stack_of(thread).end() - 64 - thread % 32 * 64);
  top[0] = reinterpret_cast<void*>(body);  // address % 16 = 0, so body is entered as if it had been called
  top[1] = nullptr;
  std::fill(top - 6, top, nullptr);
  fiber.stack_pointer = top - 6;
  fiber.state = State::ready;
  fiber.copies.clear();
  fiber.groups = 0;
}

[[noreturn]] void diverged(const Fiber& a, const Fiber& b, const std::string& rule) {
  fail("thread " + text_of(a.index) + " " + doing(a) + ", but thread " + text_of(b.index) + " " + doing(b) + ": " + rule);
}

// Runs the lanes of one warp until each waits or has returned; whether they can go on at once.
bool run_warp(Fiber* lanes, int count, Random& random) {
  const int turn = static_cast<int>(random());
  for (int i = 0; i < kWarp; ++i) {
    const int lane = (i ^ turn) & (kWarp - 1);
    if (lane < count) resume(lanes[lane]);
  }
  for (int lane = 1; lane < count; ++lane) {
    if (lanes[lane].state != lanes[0].state || (lanes[0].state == State::at_collective && lanes[lane].together != lanes[0].together))
      diverged(lanes[0], lanes[lane], "all threads of a warp must come to the same place");
  }
  if (lanes[0].state != State::at_collective) return false;
  if (count < kWarp) throw Failure{where(lanes[0]) + ": " + lanes[0].name + " in a warp of " + std::to_string(count) + " threads"};
  void* operands[kWarp];
  for (int lane = 0; lane < kWarp; ++lane) operands[lane] = lanes[lane].operands;
  lanes[0].together(operands);
  for (int lane = 0; lane < kWarp; ++lane) lanes[lane].state = State::ready;
  return true;
}

void run_block(Random& random) {
  const size_t threads = fibers.size();
  std::memset(shared_memory, kPoison, (shared_bytes + kSharedAlignment - 1) / kSharedAlignment * kSharedAlignment);
  for (size_t t = 0; t < threads; ++t) start(fibers[t], t);
  std::vector<size_t> ready;
  for (bool more = true; more;) {
    ready.resize((threads + kWarp - 1) / kWarp);
    std::iota(ready.begin(), ready.end(), 0);
    // Half the time a warp runs up to the next barrier before another begins, as far ahead as it can be; else they take turns.
    const bool turns = random() % 2 == 0;
    while (!ready.empty()) {
      const size_t at = random() % ready.size();
      const size_t first = ready[at] * kWarp;
      bool ahead;
      do {
        ahead = run_warp(&fibers[first], static_cast<int>(std::min<size_t>(kWarp, threads - first)), random);
      } while (ahead && !(turns && random() % 8 == 0));
      if (!ahead) ready.erase(ready.begin() + static_cast<ptrdiff_t>(at));
    }
    for (const Fiber& fiber : fibers)
      if (fiber.state != fibers[0].state) diverged(fibers[0], fiber, "all threads of a block must come to the same __syncthreads");
    more = fibers[0].state == State::at_barrier;
    for (Fiber& fiber : fibers) fiber.state = State::ready;
  }
  for (const unsigned char* byte = shared_memory + shared_bytes; reinterpret_cast<uintptr_t>(byte) % kSharedAlignment != 0; ++byte)
    if (*byte != kPoison) fail("a thread wrote past its " + std::to_string(shared_bytes) + " bytes of shared memory");
}

void make(const Copy& copy) {
  if (copy.from)
    std::memcpy(copy.to, copy.from, copy.bytes);
  else
    std::memset(copy.to, 0, copy.bytes);
}

void run_grid(Random& random) {
  std::vector<uint32_t> order(size_t{gridDim.x} * gridDim.y * gridDim.z);
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), random);
  for (const uint32_t block : order) {
    blockIdx = {block % gridDim.x, block / gridDim.x % gridDim.y, block / gridDim.x / gridDim.y};
    run_block(random);
  }
}

void leave() { yield(State::faulted); }

// A fault of the kernel ends its thread at once; any other is left to whoever handled it before.
constexpr int kSignals[] = {SIGSEGV, SIGBUS, SIGILL, SIGFPE};
struct sigaction before[NSIG];

void on_signal(int signal, siginfo_t* info, void* context) {
  if (!pthread_equal(pthread_self(), owner) || !running) {
    sigaction(signal, &before[signal], nullptr);
    return;
  }
  fault_signal = signal;
  fault_address = static_cast<unsigned char*>(info->si_addr);
  // The thread goes on in leave(), at the beginning of its stack, which may just have been the thing that is full.
  auto* registers = static_cast<ucontext_t*>(context)->uc_mcontext.gregs;
  registers[REG_RIP] = reinterpret_cast<greg_t>(leave);
  registers[REG_RSP] = reinterpret_cast<greg_t>(stack_of(static_cast<size_t>(running - fibers.data())).end() - 8);
}

class SignalHandlers {
 public:
  SignalHandlers() : stack_(new unsigned char[kStack]) {
    const stack_t stack{stack_.get(), 0, kStack};
    sigaltstack(&stack, &stack_before_);
    struct sigaction action{};
    action.sa_sigaction = on_signal;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    for (const int signal : kSignals) sigaction(signal, &action, &before[signal]);
  }
  ~SignalHandlers() {
    for (const int signal : kSignals) sigaction(signal, &before[signal], nullptr);
    sigaltstack(&stack_before_, nullptr);
  }

 private:
  std::unique_ptr<unsigned char[]> stack_;
  stack_t stack_before_{};
};

std::string describe_fault(const Fiber& fiber) {
  if (!stopped.empty()) return std::exchange(stopped, "");
  if (fault_signal == SIGILL || fault_signal == SIGFPE)
    return "a misaligned access, an integer overflow, a division by zero or another undefined operation";
  const auto* end = shared_memory + shared_bytes;
  if (fault_address >= end && fault_address < end + kPage)
    return "read or write past its " + std::to_string(shared_bytes) + " bytes of shared memory";
  const auto* stack = stack_of(static_cast<size_t>(&fiber - fibers.data())).begin();
  if (fault_address >= stack - kPage && fault_address < stack) return "its local variables do not fit the fiber's stack";
  char text[80];
  std::snprintf(text, sizeof text, "read or write at %p, which is nobody's memory", static_cast<const void*>(fault_address));
  return text;
}

// The symbol table of a library also names functions that it does not export.
std::string symbol_at(const char* path, uintptr_t offset) {
  const int file = open(path, O_RDONLY);
  if (file < 0) return "";
  struct stat status{};
  fstat(file, &status);
  const size_t bytes = static_cast<size_t>(status.st_size);
  auto* data = static_cast<unsigned char*>(mmap(nullptr, bytes, PROT_READ, MAP_PRIVATE, file, 0));
  close(file);
  if (data == MAP_FAILED) return "";
  std::string name;
  const auto* header = reinterpret_cast<const Elf64_Ehdr*>(data);
  const auto* sections = reinterpret_cast<const Elf64_Shdr*>(data + header->e_shoff);
  for (int s = 0; s < header->e_shnum; ++s) {
    if (sections[s].sh_type != SHT_SYMTAB) continue;
    const auto* symbols = reinterpret_cast<const Elf64_Sym*>(data + sections[s].sh_offset);
    const auto* names = reinterpret_cast<const char*>(data + sections[sections[s].sh_link].sh_offset);
    for (size_t i = 0; i < sections[s].sh_size / sizeof(Elf64_Sym); ++i)
      if (symbols[i].st_value == offset && ELF64_ST_TYPE(symbols[i].st_info) == STT_FUNC) name = names + symbols[i].st_name;
  }
  munmap(data, bytes);
  return name;
}

}  // namespace

std::string name_of(const void* function) {
  Dl_info info{};
  if (!dladdr(function, &info)) return "a function of no library";
  const std::string name = symbol_at(info.dli_fname, reinterpret_cast<uintptr_t>(function) - reinterpret_cast<uintptr_t>(info.dli_fbase));
  int status = 0;
  char* demangled = abi::__cxa_demangle(name.c_str(), nullptr, nullptr, &status);
  const std::string text = demangled ? demangled : name;
  std::free(demangled);
  return text;
}

void set_seed(uint64_t value) {
  const std::lock_guard<std::mutex> lock(one_launch);
  seed = value;
  launches = 0;
}

std::string run(const void* function, dim3 grid, dim3 block, size_t bytes, const void* task) {
  const std::lock_guard<std::mutex> lock(one_launch);
  static const Guarded shared((kMaxShared + kPage - 1) / kPage * kPage);
  const size_t threads = size_t{block.x} * block.y * block.z;
  if (threads > kMaxThreads || bytes > kMaxShared) return "more threads or shared memory than are emulated";
  owner = pthread_self();
  kernel = function;
  std::memcpy(argument.bytes, task, kArgumentBytes);
  gridDim = grid;
  blockDim = block;
  shared_bytes = bytes;
  shared_memory = shared.end() - (bytes + kSharedAlignment - 1) / kSharedAlignment * kSharedAlignment;
  fibers.resize(threads);
  for (unsigned t = 0; t < threads; ++t) fibers[t].index = {t % block.x, t / block.x % block.y, t / block.x / block.y};
  Random random{seed * 0x9e3779b97f4a7c15u + launches++};
  const SignalHandlers handlers;
  try {
    order = &random;
    run_grid(random);
  } catch (const Failure& failure) {
    return name_of(function) + ": " + failure.text;
  }
  return "";
}

void collective(const char* name, void (*together)(void* const (&)[kWarp]), void* operands) {
  running->name = name;
  running->together = together;
  running->operands = operands;
  yield(State::at_collective);
}

void fail(const std::string& text) { throw Failure{"block " + text_of(blockIdx) + ": " + text}; }

void stop(const std::string& text) {
  stopped = text;
  yield(State::faulted);
}

void copy_later(void* to, const void* from, size_t bytes) {
  const Copy copy{to, from, bytes, running->groups};
  if ((*order)() % 4 == 0) return make(copy);
  std::memset(to, kPoison, bytes);
  running->copies.push_back(copy);
}

void commit_copies() { ++running->groups; }

void finish_copies(size_t pending) {
  auto& copies = running->copies;
  const size_t groups = running->groups;
  const auto waits = [&](const Copy& copy) { return copy.group + pending >= groups; };
  for (const Copy& copy : copies)
    if (!waits(copy)) make(copy);
  copies.erase(std::remove_if(copies.begin(), copies.end(), [&](const Copy& copy) { return !waits(copy); }), copies.end());
}

bool in_shared_memory(const void* pointer, size_t bytes) {
  const auto* byte = static_cast<const unsigned char*>(pointer);
  return byte >= shared_memory && byte + bytes <= shared_memory + shared_bytes;
}

}  // namespace emulator

void __syncthreads() { emulator::yield(emulator::State::at_barrier); }
