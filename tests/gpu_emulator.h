// A workgroup of a GPU on one thread of the host: every GPU thread is a fiber, which runs until it
// waits for its warp or its workgroup. What the matrix units do is written down from the PTX ISA
// (mma.m16n8k16, ldmatrix) and the Metal Shading Language Specification (SIMD-group functions).
//
// One block at a time, in either order of its warps, so that a barrier that is missing shows in
// the results: a warp goes as far as barriers let it before the next one begins. Shared memory
// holds NaN before a block begins. A barrier that not all threads reach ends the process.
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

struct half {
  uint16_t bits;
  half() = default;
#if defined(__x86_64__)
  explicit half(float value) : bits(_cvtss_sh(value, 0)) {}
  operator float() const { return _cvtsh_ss(bits); }
#else
  explicit half(float value) {
    __fp16 narrow = value;
    memcpy(&bits, &narrow, 2);
  }
  operator float() const {
    __fp16 narrow;
    memcpy(&narrow, &bits, 2);
    return narrow;
  }
#endif
};

struct uint3_ {
  unsigned x, y, z;
};

namespace emulator {

constexpr int kWarp = 32, kSharedBytes = 65536, kStack = 65536;

struct Barrier {
  int size, arrived = 0;
  long generation = 0;
};

struct Warp {
  Barrier barrier{kWarp};
  unsigned address[kWarp], a[kWarp][4], b[kWarp][2];
  const void* pointer[kWarp];
};

// Of cp.async: when it writes is open until it is waited for. So what it will write is NaN from the
// beginning on, and only the wait brings the values.
struct Copy {
  char* to;
  const void* from;
  int size, bytes;  // of `size`, what is past `bytes` becomes zeros
};

struct Thread {
  ucontext_t context;
  std::vector<Copy> issued;
  std::deque<std::vector<Copy>> committed;  // groups
  std::unique_ptr<char[]> stack;
  bool done = false;
  uint3_ index;
  int flat, shared_used = 0;
};

alignas(128) inline char shared[kSharedBytes];
inline ucontext_t scheduler;
inline std::vector<Thread> threads;
inline std::vector<Warp> warps;
inline Barrier block_barrier;
inline Thread* current;
inline uint3_ block;
inline std::function<void()> body;
inline bool progress;
inline long conflicts;  // rows of an ldmatrix that meet in a bank

[[noreturn]] inline void fail(const char* what) {
  fprintf(stderr, "emulator: %s\n", what);
  _Exit(3);
}

inline void wait_for(Barrier& barrier) {
  long generation = barrier.generation;
  progress = true;
  if (++barrier.arrived == barrier.size) {
    barrier.arrived = 0;
    ++barrier.generation;
    return;
  }
  while (barrier.generation == generation) swapcontext(&current->context, &scheduler);
}

inline Warp& warp() { return warps[current->flat / kWarp]; }
inline int lane() { return current->flat % kWarp; }
inline void sync_warp() { wait_for(warp().barrier); }
inline void sync_block() { wait_for(block_barrier); }

inline void enter() {
  body();
  current->done = progress = true;
}

// The next array of shared memory, in the order of the declarations.
inline void* array(int bytes) {
  void* found = shared + current->shared_used;
  current->shared_used += (bytes + 127) / 128 * 128;
  if (current->shared_used > kSharedBytes) fail("too much shared memory");
  return found;
}

inline void run_block(uint3_ size, bool reversed) {
  int count = size.x * size.y * size.z;
  if (count % kWarp) fail("part of a warp");
  memset(shared, 0xff, sizeof shared);
  threads.clear();
  threads.resize(count);
  warps.assign(count / kWarp, Warp());
  block_barrier = Barrier{count};
  for (int i = 0; i < count; ++i) {
    Thread& t = threads[i];
    t.flat = i;
    t.index = {i % size.x, i / size.x % size.y, i / size.x / size.y};
    t.stack.reset(new char[kStack]);
    getcontext(&t.context);
    t.context.uc_stack.ss_sp = t.stack.get();
    t.context.uc_stack.ss_size = kStack;
    t.context.uc_link = &scheduler;
    makecontext(&t.context, enter, 0);
  }
  for (bool all = false; !all;) {
    all = true;
    bool any = false;
    for (int w = 0; w < (int)warps.size(); ++w) {
      int first = (reversed ? (int)warps.size() - 1 - w : w) * kWarp;
      do {
        progress = false;
        for (int i = 0; i < kWarp; ++i) {
          current = &threads[first + (reversed ? kWarp - 1 - i : i)];
          if (!current->done) swapcontext(&scheduler, &current->context);
        }
        any |= progress;
      } while (progress);
      for (int i = 0; i < kWarp; ++i) all &= threads[first + i].done;
    }
    if (!any && !all) fail("a barrier that not all threads reach");
  }
}

inline void run_grid(uint3_ grid, uint3_ size, bool reversed, std::function<void()> kernel) {
  body = kernel;
  conflicts = 0;
  for (block.z = 0; block.z < grid.z; ++block.z)
    for (block.y = 0; block.y < grid.y; ++block.y)
      for (block.x = 0; block.x < grid.x; ++block.x) run_block(size, reversed);
}

// The rows, 16 bytes each, that 8 threads name together: how many of them meet in a bank.
inline void count_conflicts(const unsigned* address) {
  for (int i = 0; i < 8; ++i)
    for (int j = 0; j < i; ++j) conflicts += address[i] / 16 % 8 == address[j] / 16 % 8;
}

inline float half_of(unsigned pair, int which) {
  half h;
  h.bits = uint16_t(pair >> 16 * which);
  return h;
}

// ldmatrix.sync.aligned.m8n8.x4.shared.b16: thread 8m + r has the address of row r of matrix m;
// register m of a thread gets elements 2·(lane % 4), … of row lane / 4 of matrix m.
inline void ldmatrix_x4(unsigned& r0, unsigned& r1, unsigned& r2, unsigned& r3, unsigned address) {
  Warp& w = warp();
  if (address % 16) fail("ldmatrix of an address that is not aligned");
  w.address[lane()] = address;
  sync_warp();
  unsigned* out[4] = {&r0, &r1, &r2, &r3};
  for (int m = 0; m < 4; ++m) {
    unsigned from = w.address[8 * m + lane() / 4] + lane() % 4 * 4;
    memcpy(out[m], shared + from, 4);
  }
  if (lane() % 8 == 0) count_conflicts(w.address + lane());
  sync_warp();
}

// With .trans: elements 2·(lane % 4), … of column lane / 4.
inline void ldmatrix_x4_trans(unsigned& r0, unsigned& r1, unsigned& r2, unsigned& r3,
                              unsigned address) {
  Warp& w = warp();
  if (address % 16) fail("ldmatrix of an address that is not aligned");
  w.address[lane()] = address;
  sync_warp();
  unsigned* out[4] = {&r0, &r1, &r2, &r3};
  for (int m = 0; m < 4; ++m)
    for (int i = 0; i < 2; ++i)
      memcpy((char*)out[m] + 2 * i, shared + w.address[8 * m + lane() % 4 * 2 + i] + lane() / 4 * 2, 2);
  if (lane() % 8 == 0) count_conflicts(w.address + lane());
  sync_warp();
}

inline void cp_async(unsigned to, const void* from, int size, unsigned bytes) {
  Warp& w = warp();
  if (to % size || (uintptr_t)from % size || (int)bytes > size) fail("cp.async is not aligned");
  w.address[lane()] = to;
  sync_warp();
  if (lane() % 8 == 0 && size == 16) count_conflicts(w.address + lane());
  memset(shared + to, 0xff, size);
  current->issued.push_back({shared + to, from, size, (int)bytes});
  sync_warp();
}

inline void cp_async_commit() {
  current->committed.push_back(std::move(current->issued));
  current->issued.clear();
}

// For all groups but the last ones.
inline void cp_async_wait(int last) {
  for (; (int)current->committed.size() > last; current->committed.pop_front())
    for (const Copy& copy : current->committed.front()) {
      memset(copy.to, 0, copy.size);
      memcpy(copy.to, copy.from, copy.bytes);
    }
}

template <typename T>
T from_lane(T value, int from) {
  Warp& w = warp();
  memcpy(&w.address[lane()], &value, sizeof value);
  sync_warp();
  memcpy(&value, &w.address[from], sizeof value);
  sync_warp();
  return value;
}

inline bool any(bool mine) {
  Warp& w = warp();
  w.address[lane()] = mine;
  sync_warp();
  bool found = false;
  for (unsigned one : w.address) found |= one;
  sync_warp();
  return found;
}

// mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32. The fragments: A's element i is in row
// group (+ 8 for i = 2, 3, 6, 7), column 2·t + i % 2 (+ 8 for i ≥ 4); B's in row 2·t + i % 2
// (+ 8 for i ≥ 2), column group; C's in row group (+ 8 for i ≥ 2), column 2·t + i % 2;
// group = lane / 4, t = lane % 4.
inline void mma_m16n8k16(float& d0, float& d1, float& d2, float& d3, unsigned a0, unsigned a1,
                         unsigned a2, unsigned a3, unsigned b0, unsigned b1, float c0, float c1,
                         float c2, float c3) {
  Warp& w = warp();
  unsigned a[4] = {a0, a1, a2, a3}, b[2] = {b0, b1};
  memcpy(w.a[lane()], a, sizeof a);
  memcpy(w.b[lane()], b, sizeof b);
  sync_warp();
  auto element_a = [&](int row, int column) {
    int owner = row % 8 * 4 + column % 8 / 2, i = column / 8 * 4 + row / 8 * 2 + column % 2;
    return half_of(w.a[owner][i / 2], i % 2);
  };
  auto element_b = [&](int row, int column) {
    int owner = column * 4 + row % 8 / 2, i = row / 8 * 2 + row % 2;
    return half_of(w.b[owner][i / 2], i % 2);
  };
  float c[4] = {c0, c1, c2, c3};
  for (int i = 0; i < 4; ++i) {
    int row = lane() / 4 + i / 2 * 8, column = lane() % 4 * 2 + i % 2;
    double sum = c[i];
    for (int k = 0; k < 16; ++k) sum += double(element_a(row, k)) * element_b(k, column);
    c[i] = float(sum);
  }
  sync_warp();
  d0 = c[0], d1 = c[1], d2 = c[2], d3 = c[3];
}

// A simdgroup's 8 × 8 matrix, row by row. How its elements lie in the threads is not specified, so
// every thread has all of them here, and writes two when it is stored.
template <typename T>
struct Matrix {
  T e[64];
};

inline void same_for_all(const void* pointer) {
  Warp& w = warp();
  w.pointer[lane()] = pointer;
  sync_warp();
  for (auto p : w.pointer)
    if (p != pointer) fail("a matrix function with different pointers");
  sync_warp();
}

template <typename T>
void load(Matrix<T>& m, const T* from, long stride, bool transposed) {
  same_for_all(from);
  for (int r = 0; r < 8; ++r)
    for (int c = 0; c < 8; ++c) m.e[r * 8 + c] = transposed ? from[c * stride + r] : from[r * stride + c];
  sync_warp();
}

template <typename T>
void store(const Matrix<T>& m, T* to, long stride, bool transposed) {
  same_for_all(to);
  for (int i = 2 * lane(); i < 2 * lane() + 2; ++i)
    to[transposed ? i % 8 * stride + i / 8 : i / 8 * stride + i % 8] = m.e[i];
}

template <typename D, typename A>
void multiply_accumulate(Matrix<D>& d, const Matrix<A>& a, const Matrix<A>& b, Matrix<D> c) {
  sync_warp();
  for (int i = 0; i < 64; ++i) {
    double sum = c.e[i];
    for (int k = 0; k < 8; ++k) sum += double(float(a.e[i / 8 * 8 + k])) * float(b.e[k * 8 + i % 8]);
    d.e[i] = D(sum);
  }
}

}  // namespace emulator

// The languages, as far as the kernels use them.

#define __restrict__

template <typename T, int N>
struct alignas(sizeof(T) * N) Vector {
  T x, y;
  T rest[N - 2];
  T& operator[](int i) { return (&x)[i]; }
};
template <typename T>
struct alignas(sizeof(T) * 2) Vector<T, 2> {
  T x, y;
  T& operator[](int i) { return (&x)[i]; }
};

using uint = unsigned;
using half2 = Vector<half, 2>;
using half4 = Vector<half, 4>;
using float2 = Vector<float, 2>;
using float4 = Vector<float, 4>;
using uint2 = Vector<uint, 2>;
using uint4 = Vector<uint, 4>;

template <typename T>
T min(T a, T b) {
  return b < a ? b : a;
}

template <typename T>
T max(T a, T b) {
  return a < b ? b : a;
}

#ifdef EMULATE_CUDA
#define threadIdx (emulator::current->index)
#define blockIdx (emulator::block)
#define __syncthreads() emulator::sync_block()
inline half __float2half_rn(float value) { return half(value); }
inline float __uint_as_float(unsigned bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
inline unsigned __cvta_generic_to_shared(const void* p) {
  return unsigned((const char*)p - emulator::shared);
}
inline float2 make_float2(float x, float y) { return {x, y}; }
inline unsigned __activemask() { return ~0u; }
template <typename T>
T __shfl_sync(unsigned, T value, int lane, int width) {
  return emulator::from_lane(value, emulator::lane() / width * width + lane % width);
}
template <typename T>
T __shfl_down_sync(unsigned, T value, int delta, int width) {
  int lane = emulator::lane();
  return emulator::from_lane(value, lane % width + delta < width ? lane + delta : lane);
}
template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask, int) {
  return emulator::from_lane(value, emulator::lane() ^ mask);
}
// TVM's functions of one PTX instruction, which it writes before the kernels.
inline unsigned tvm_builtin_cuda_cvta_generic_to_shared(void* p) {
  return __cvta_generic_to_shared(p);
}
inline int tvm_builtin_cuda_any_sync(unsigned, int mine) { return emulator::any(mine); }
inline void tvm_builtin_ptx_cp_async_cg_async_cg_shared_global_16(unsigned to, const void* from) {
  emulator::cp_async(to, from, 16, 16);
}
#define COPY(name, size)                                                         \
  inline void tvm_builtin_ptx_cp_async_##name##_##size(unsigned to, const void* from, \
                                                       unsigned bytes) {         \
    emulator::cp_async(to, from, size, bytes);                                   \
  }
COPY(cg_src_size_async_cg_shared_global, 16)
COPY(cg_src_size_async_cg_shared_global_L2__128B, 16)
COPY(ca_src_size_async_ca_shared_global_L2__128B, 8)
COPY(ca_src_size_async_ca_shared_global_L2__128B, 4)
inline void tvm_builtin_ptx_cp_async_commit_group_async_commit_group() {
  emulator::cp_async_commit();
}
#define WAIT(last)                                                                \
  inline void tvm_builtin_ptx_cp_async_wait_group_async_wait_group_##last() { \
    emulator::cp_async_wait(last);                                                \
  }
WAIT(0)
WAIT(1)
WAIT(2)
WAIT(3)
WAIT(4)
WAIT(5)
inline void tvm_builtin_ptx_prmt_b32(unsigned& to, unsigned a, unsigned b, unsigned bytes) {
  uint64_t both = (uint64_t)b << 32 | a;
  unsigned found = 0;  // a selector's fourth bit, which spreads a sign, is not emulated
  for (int i = 0; i < 4; ++i)
    found |= unsigned(both >> 8 * (bytes >> 4 * i & 7) & 0xff) << 8 * i;
  to = found;
}
// Of two halves. The float holds what these kernels' sums and products are before they are rounded.
template <typename F>
unsigned of_halves(F result) {
  unsigned found = 0;
  for (int i = 0; i < 2; ++i) found |= (unsigned)half(result(i)).bits << 16 * i;
  return found;
}
inline void tvm_builtin_ptx_add_half_rn_f16x2(unsigned& to, unsigned a, unsigned b) {
  using emulator::half_of;
  to = of_halves([=](int i) { return half_of(a, i) + half_of(b, i); });
}
inline void tvm_builtin_ptx_mul_half_rn_f16x2(unsigned& to, unsigned a, unsigned b) {
  using emulator::half_of;
  to = of_halves([=](int i) { return half_of(a, i) * half_of(b, i); });
}
inline void tvm_builtin_ptx_fma_half_rn_f16x2(unsigned& to, unsigned a, unsigned b, unsigned c) {
  using emulator::half_of;
  to = of_halves([=](int i) { return half_of(a, i) * half_of(b, i) + half_of(c, i); });
}
inline float without_denormals(float x) { return std::fabs(x) < 1.17549435e-38f ? 0 : x; }
inline void tvm_builtin_ptx_ex2_approx_ftz_f32(float& to, float x) {
  to = without_denormals(std::exp2(without_denormals(x)));
}
inline void tvm_builtin_ptx_rcp_approx_ftz_f32(float& to, float x) {
  to = without_denormals(1 / without_denormals(x));
}
#else
#define device
#define thread
#define threadgroup
#define constant
inline half operator""_h(long double value) { return half(float(value)); }
namespace mem_flags {
constexpr int mem_threadgroup = 0;
}
inline void threadgroup_barrier(int) { emulator::sync_block(); }
inline void simdgroup_barrier(int) { emulator::sync_warp(); }
template <typename To, typename From>
To as_type(From from) {
  To to;
  static_assert(sizeof to == sizeof from);
  memcpy(&to, &from, sizeof to);
  return to;
}
using simdgroup_half8x8 = emulator::Matrix<half>;
using simdgroup_float8x8 = emulator::Matrix<float>;
template <typename T, int, int>
emulator::Matrix<T> make_filled_simdgroup_matrix(T value) {
  emulator::Matrix<T> m;
  for (T& e : m.e) e = value;
  return m;
}
template <typename T>
void simdgroup_load(emulator::Matrix<T>& m, const T* from, long stride, long, bool transposed) {
  emulator::load(m, from, stride, transposed);
}
template <typename T>
void simdgroup_store(const emulator::Matrix<T>& m, T* to, long stride, long, bool transposed) {
  emulator::store(m, to, stride, transposed);
}
template <typename D, typename A>
void simdgroup_multiply_accumulate(emulator::Matrix<D>& d, const emulator::Matrix<A>& a,
                                   const emulator::Matrix<A>& b, const emulator::Matrix<D>& c) {
  emulator::multiply_accumulate(d, a, b, c);
}
#endif
