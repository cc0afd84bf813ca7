// The host's version of device.cu: a kernel runs on the CPU, block after block, each CUDA thread on its own stack.
//
// A warp runs until all of it waits for the block, a thread until it waits for its warp; then the next one does, or the
// one before: so far apart do they get that what lacks a barrier comes out wrong, or different in the two orders.
// A block whose threads do not all reach a barrier stops the process with a message. Rounding is the GPU's (to nearest
// even); the sums of a product are in float32, in the order of k.

#include <csetjmp>
#include <csignal>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ucontext.h>
#include <utility>
#include <vector>

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
struct Index { int x, y, z; };
struct float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct uint2 { u32 x, y; };
struct alignas(16) uint4 { u32 x, y, z, w; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline uint2 make_uint2(u32 x, u32 y) { return {x, y}; }
inline uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }

#define DEVICE static inline
#define DEVICE_MEMBER
#define KERNEL(threads) static void
#define SHARED alignas(16) static
#define BLOCK_BARRIER() host::wait(host::block)
#define WARP_BARRIER() host::wait(host::warps[threadIdx.x / 32])

static Index threadIdx, blockIdx;

namespace host {

struct Barrier { int members, arrived, round; };
struct Lane { float value; float b[2][2]; float a[4][2]; };

constexpr size_t STACK = 128 * 1024;
constexpr int MOST_THREADS = 512;
static ucontext_t contexts[MOST_THREADS];
static jmp_buf scheduler, threads[MOST_THREADS];
static bool started[MOST_THREADS], finished[MOST_THREADS];
static int progress;
static bool backwards;
static sigjmp_buf outside;
static Barrier block, warps[MOST_THREADS / 32];
static Lane lanes[MOST_THREADS];
static void (*body)(void **);
static void **arguments;

static void wait(Barrier &barrier) {
    int thread = threadIdx.x, round = barrier.round;
    progress++;
    if (++barrier.arrived == barrier.members) {
        barrier.arrived = 0;
        barrier.round++;
        return;
    }
    while (barrier.round == round)
        if (_setjmp(threads[thread]) == 0) _longjmp(scheduler, 1);
}

static void enter() {
    body(arguments);
    finished[threadIdx.x] = true;
    progress++;
    _longjmp(scheduler, 1);
}

// Runs a thread until it waits or ends.
static void resume(int thread) {
    static std::vector<char> stacks(STACK * MOST_THREADS);
    threadIdx = {thread, 0, 0};
    if (_setjmp(scheduler) != 0) return;
    if (started[thread]) _longjmp(threads[thread], 1);
    started[thread] = true;
    getcontext(&contexts[thread]);
    contexts[thread].uc_stack.ss_sp = stacks.data() + STACK * thread;
    contexts[thread].uc_stack.ss_size = STACK;
    contexts[thread].uc_link = nullptr;
    makecontext(&contexts[thread], enter, 0);
    setcontext(&contexts[thread]);
}

static void run_block(int count) {
    block = {count, 0, 0};
    for (int w = 0; w < count / 32; w++) warps[w] = {32, 0, 0};
    for (int t = 0; t < count; t++) started[t] = finished[t] = false;
    for (bool busy = true, moved; busy;) {
        busy = moved = false;
        for (int w = 0; w < count / 32; w++) {
            do {
                progress = 0;
                for (int lane = 0; lane < 32; lane++) {
                    int t = backwards ? count - 1 - w * 32 - lane : w * 32 + lane;
                    if (finished[t]) continue;
                    busy = true;
                    resume(t);
                }
                moved |= progress > 0;
            } while (progress);
        }
        if (busy && !moved) {
            std::fprintf(stderr, "block (%d, %d): threads wait for one that never comes\n", blockIdx.x, blockIdx.y);
            std::abort();
        }
    }
}

// Runs a grid; false where a thread touched memory that it must not.
static bool run_grid(int x, int y, int threads) {
    struct sigaction handler = {}, before[2];
    handler.sa_handler = [](int) { siglongjmp(outside, 1); };
    sigaction(SIGSEGV, &handler, &before[0]);
    sigaction(SIGBUS, &handler, &before[1]);
    volatile bool inside = false;
    if (sigsetjmp(outside, 1) == 0) {
        for (int j = 0; j < y; j++)
            for (int i = 0; i < x; i++) blockIdx = {i, j, 0}, run_block(threads);
        inside = true;
    }
    sigaction(SIGSEGV, &before[0], nullptr);
    sigaction(SIGBUS, &before[1], nullptr);
    return inside;
}

inline float half_value(u16 bits) {
    u32 sign = (u32)(bits & 0x8000) << 16, exponent = bits >> 10 & 31, mantissa = bits & 1023;
    float magnitude = exponent == 0    ? std::ldexp((float)mantissa, -24)
                      : exponent == 31 ? (mantissa ? NAN : INFINITY)
                                       : std::ldexp((float)(mantissa | 1024), (int)exponent - 25);
    return sign ? -magnitude : magnitude;
}

inline u16 half_bits(float value) {
    u32 bits;
    std::memcpy(&bits, &value, 4);
    u16 sign = bits >> 16 & 0x8000;
    float magnitude = std::fabs(value);
    if (std::isnan(value)) return sign | 0x7fff;
    if (magnitude >= 65520.0f) return sign | 0x7c00;
    int exponent;
    std::frexp(magnitude, &exponent);
    if (exponent < -13 || magnitude == 0)  // a subnormal, or rounded up to 2^-14, the bits of which come next
        return sign | (u16)std::nearbyint(std::ldexp(magnitude, 24));
    // 11 bits of mantissa, their top bit added to the exponent; a carry out of them goes there by itself.
    return sign | (u16)((exponent + 13) * 1024 + (int)std::nearbyint(std::ldexp(magnitude, 11 - exponent)));
}

}  // namespace host

DEVICE float as_float(u32 bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

#if BF16
DEVICE float to_float(u16 value) { return as_float((u32)value << 16); }

DEVICE u16 from_float(float value) {
    u32 bits;
    std::memcpy(&bits, &value, 4);
    if (std::isnan(value)) return 0x7fff;
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
#else
DEVICE float to_float(u16 value) {
    static const std::vector<float> table = [] {
        std::vector<float> values(65536);
        for (int i = 0; i < 65536; i++) values[i] = host::half_value((u16)i);
        return values;
    }();
    return table[value];
}

DEVICE u16 from_float(float value) { return host::half_bits(value); }
#endif

DEVICE u32 pack(float low, float high) { return from_float(low) | (u32)from_float(high) << 16; }
DEVICE uint4 load_stream(const uint4 *address, bool inside) { return inside ? *address : uint4{}; }
DEVICE uint2 load_stream(const uint2 *address, bool inside) { return inside ? *address : uint2{}; }
DEVICE uint2 load_cached(const uint2 *address, bool inside) { return inside ? *address : uint2{}; }

DEVICE u32 byte_of(u32 word, int index) { return word >> 8 * index & 255; }

DEVICE float shuffle_xor(float value, int mask) {
    host::lanes[threadIdx.x].value = value;
    WARP_BARRIER();
    float other = host::lanes[threadIdx.x ^ mask].value;
    WARP_BARRIER();
    return other;
}

// Register r of a holds row g + 8 (r % 2), k = 8 (r / 2) + 2t and the next; register r of b: column g, k = 8r + 2t and
// the next; c: rows g, g, g + 8, g + 8 and columns 2t, 2t + 1, 2t, 2t + 1; g = lane / 4, t = lane % 4.
DEVICE void mma(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    int first = threadIdx.x / 32 * 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    host::Lane &own = host::lanes[threadIdx.x];
    for (int r = 0; r < 4; r++) own.a[r][0] = to_float((u16)a[r]), own.a[r][1] = to_float((u16)(a[r] >> 16));
    for (int r = 0; r < 2; r++) own.b[r][0] = to_float((u16)b[r]), own.b[r][1] = to_float((u16)(b[r] >> 16));
    WARP_BARRIER();
    for (int i = 0; i < 4; i++)
        for (int k = 0; k < 16; k++) {
            const host::Lane &left = host::lanes[first + g * 4 + k % 8 / 2];
            const host::Lane &right = host::lanes[first + (2 * t + i % 2) * 4 + k % 8 / 2];
            c[i] += left.a[k / 8 * 2 + i / 2][k % 2] * right.b[k / 8][k % 2];
        }
    WARP_BARRIER();
}

template <class... Parameters, size_t... I>
static void call(void (*kernel)(Parameters...), void **arguments, std::index_sequence<I...>) {
    kernel(*(Parameters *)arguments[I]...);
}

// extern "C" name_on_host(pointers to the arguments, grid, threads of a block, whether the last thread goes first),
// 1 where the kernel stayed inside of its memory
#define HOST_ENTRY(name)                                                                            \
    template <class... Parameters>                                                                  \
    static void name##_call(void (*)(Parameters...), void **arguments) {                            \
        call<Parameters...>(name, arguments, std::index_sequence_for<Parameters...>{});             \
    }                                                                                               \
    extern "C" int name##_on_host(void **arguments, int x, int y, int threads, int backwards) {     \
        host::arguments = arguments;                                                                \
        host::backwards = backwards;                                                                \
        host::body = [](void **from) { name##_call(name, from); };                                  \
        return host::run_grid(x, y, threads);                                                       \
    }
