// What the kernels need of the GPU, in inline PTX since NVRTC brings no headers: activation type, shuffles, mma.
// BF16 = 1: activations are bfloat16, else float16; both are held as their 16 bits.
// The tests compile the same kernels with a host version of this file.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;

#define DEVICE static __device__ __forceinline__
#define DEVICE_MEMBER __device__ __forceinline__
#define KERNEL(threads) extern "C" __global__ void __launch_bounds__(threads)
#define SHARED __shared__ __align__(16)
#define BLOCK_BARRIER() __syncthreads()
#define WARP_BARRIER() __syncwarp()

DEVICE float as_float(u32 bits) { return __uint_as_float(bits); }

DEVICE float to_float(u16 value) {
#if BF16
    return __uint_as_float((u32)value << 16);
#else
    float result;
    asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value));
    return result;
#endif
}

DEVICE u16 from_float(float value) {
    u16 result;
#if BF16
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result) : "f"(value));
#else
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result) : "f"(value));
#endif
    return result;
}

// Two values in one register, the first in the low half.
DEVICE u32 pack(float low, float high) {
    u32 result;
#if BF16
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
#else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
#endif
    return result;
}

// Loads under a predicate, zero where it is false: no branch, so that many of them are on their way at once.
// A stream passes once and must not push the activations out of the first-level cache.
DEVICE uint4 load_stream(const uint4 *address, bool inside) {
    uint4 v;
    asm("{ .reg .pred p; setp.ne.u32 p, %5, 0; mov.u32 %0, 0; mov.u32 %1, 0; mov.u32 %2, 0; mov.u32 %3, 0;\n\t"
        "@p ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4]; }"
        : "=&r"(v.x), "=&r"(v.y), "=&r"(v.z), "=&r"(v.w)
        : "l"(address), "r"((u32)inside));
    return v;
}

DEVICE uint2 load_stream(const uint2 *address, bool inside) {
    uint2 v;
    asm("{ .reg .pred p; setp.ne.u32 p, %3, 0; mov.u32 %0, 0; mov.u32 %1, 0;\n\t"
        "@p ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2]; }"
        : "=&r"(v.x), "=&r"(v.y)
        : "l"(address), "r"((u32)inside));
    return v;
}

DEVICE uint2 load_cached(const uint2 *address, bool inside) {
    uint2 v;
    asm("{ .reg .pred p; setp.ne.u32 p, %3, 0; mov.u32 %0, 0; mov.u32 %1, 0;\n\t"
        "@p ld.global.nc.v2.u32 {%0, %1}, [%2]; }"
        : "=&r"(v.x), "=&r"(v.y)
        : "l"(address), "r"((u32)inside));
    return v;
}

// Byte `index` of a word, in one instruction also where the index is known late.
DEVICE u32 byte_of(u32 word, int index) { return __byte_perm(word, 0, 0x4440 + index); }

DEVICE float shuffle_xor(float value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }

// c += a b of one warp: a [16, 16] by rows, b [16, 8] by columns, c [16, 8], in the fragments of mma.m16n8k16.
DEVICE void mma(float (&c)[4], const u32 (&a)[4], const u32 (&b)[2]) {
#if BF16
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
#endif
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
