// y [rows, out] = x [rows, columns] w^T (+ bias), w in 3 bits with a scale and a zero per group of inputs:
//
//     w[o, i] = (q[o, i] - zero[o, i / GROUP]) scale[o, i / GROUP]
//     packed [step, columns], step = ceil(out / 10):   packed[r, i] = OR over k of q[k step + r, i] << (27 - 3k)
//
// so a word holds 10 outputs of one input. Compile time: BF16, GROUP, and, each 0 or 1, BIAS, META_SCALE, META_ZERO.
// scale and zero [out, groups] are activations' type or, with META, bytes: value = (code - meta_zero) meta_scale with
// float32 meta values for every 128 consecutive entries. Parameters: inputs, sizes, output.
//
// The field at bit p of a word, masked and taken for a float32, is the subnormal q 2^(p - 149): decoding is one AND,
// and the power of two goes into the scale. Inputs carry 2^64 so that no product leaves the normal numbers; an
// activation past 2^63 overflows. Zeros come in through the sum of a lane's inputs:
// sum (q - z) s x = s sum q x - s z sum x.

#define FIELDS 10
#define META_BLOCK 128

#if META_SCALE
#define SCALE_PARAMETERS const u8 *scale, const float *scale_meta_scale, const float *scale_meta_zero
#define SCALE_ARGUMENTS {scale, scale_meta_scale, scale_meta_zero}
#else
#define SCALE_PARAMETERS const u16 *scale
#define SCALE_ARGUMENTS {scale}
#endif
#if META_ZERO
#define ZERO_PARAMETERS const u8 *zero, const float *zero_meta_scale, const float *zero_meta_zero
#define ZERO_ARGUMENTS {zero, zero_meta_scale, zero_meta_zero}
#else
#define ZERO_PARAMETERS const u16 *zero
#define ZERO_ARGUMENTS {zero}
#endif
#if BIAS
#define BIAS_PARAMETER const u16 *bias,
#define BIAS_OF(output) to_float(bias[output])
#else
#define BIAS_PARAMETER
#define BIAS_OF(output) 0.0f
#endif

// An array of float16/bfloat16 values, and the same in 8 bits. `bits` only loads; `value` computes.
struct PlainValues {
    const u16 *values;
    struct Bits {
        u16 value;
    };
    DEVICE_MEMBER Bits bits(long long index) const { return {values[index]}; }
    DEVICE_MEMBER static float value(Bits b) { return to_float(b.value); }
};

struct MetaValues {
    const u8 *codes;
    const float *meta_scale, *meta_zero;
    struct Bits {
        u8 code;
        float scale, zero;
    };
    DEVICE_MEMBER Bits bits(long long index) const {
        return {codes[index], meta_scale[index / META_BLOCK], meta_zero[index / META_BLOCK]};
    }
    DEVICE_MEMBER static float value(Bits b) { return ((float)b.code - b.zero) * b.scale; }
};

#if META_SCALE
typedef MetaValues Scales;
#else
typedef PlainValues Scales;
#endif
#if META_ZERO
typedef MetaValues Zeros;
#else
typedef PlainValues Zeros;
#endif

#ifdef INT3_GEMV
// Up to ROWS rows in a block, all of a word row (10 outputs): 8 warps share the columns.
//
// Eight lanes walk one span, columns within one group, so that neighbouring lanes read neighbouring 16 bytes and every
// lane has one scale per output at a time; four spans a warp. The words of a lane's next span are on their way while
// the present one is multiplied. Compile time: ROWS 1 to 8, VECTOR 4 (columns and GROUP divide by 4) or 1.

#define WARPS 8
#define LOADS (GROUP >= 128 && ROWS == 1 ? 4 : GROUP >= 64 && ROWS <= 2 ? 2 : 1)
#define LANE_COLUMNS (LOADS * VECTOR)
#define SPAN (8 * LANE_COLUMNS)
#define SPANS_PER_GROUP ((GROUP + SPAN - 1) / SPAN)
#define STAGED_GROUPS 128
#define SUMS (FIELDS * ROWS)

struct Span {
    int group, end, columns[LOADS];  // columns: the first of each of the lane's loads

    DEVICE_MEMBER Span(int index, int j, int limit) {
        group = index / SPANS_PER_GROUP;
        int first = group * GROUP + index % SPANS_PER_GROUP * SPAN;
        end = (group + 1) * GROUP < limit ? (group + 1) * GROUP : limit;
#pragma unroll
        for (int i = 0; i < LOADS; i++) columns[i] = first + (i * 8 + j) * VECTOR;
    }
};

DEVICE void load_words(u32 (&words)[LANE_COLUMNS], const u32 *row, const Span &span) {
#pragma unroll
    for (int i = 0; i < LOADS; i++) {
        bool inside = span.columns[i] < span.end;
#if VECTOR == 4
        uint4 v = load_stream((const uint4 *)(row + span.columns[i]), inside);
        words[4 * i] = v.x, words[4 * i + 1] = v.y, words[4 * i + 2] = v.z, words[4 * i + 3] = v.w;
#else
        words[i] = inside ? row[span.columns[i]] : 0;
#endif
    }
}

// A lane's inputs of one row, times 2^64; zero outside.
DEVICE void load_inputs(float (&inputs)[LANE_COLUMNS], const u16 *row, bool exists, const Span &span) {
#pragma unroll
    for (int i = 0; i < LOADS; i++) {
        bool inside = exists && span.columns[i] < span.end;
#if VECTOR == 4
        uint2 v = load_cached((const uint2 *)(row + span.columns[i]), inside);
        u16 values[4] = {(u16)v.x, (u16)(v.x >> 16), (u16)v.y, (u16)(v.y >> 16)};
#else
        u16 values[1] = {inside ? row[span.columns[i]] : (u16)0};
#endif
#pragma unroll
        for (int c = 0; c < VECTOR; c++) inputs[i * VECTOR + c] = to_float(values[c]) * 0x1p64f;
    }
}

// Adds a lane's part of one field to its sums. For a few rows codes are multiplied as they are, and a dot product is
// scaled: ROWS FMAs a code and 2 ROWS a group. From 4 rows on it is less to scale each code first: 1 + ROWS a code.
DEVICE void add_products(float *sums, float (&codes)[LANE_COLUMNS], const float (&inputs)[ROWS][LANE_COLUMNS],
                         float2 pair) {
#if ROWS >= 4
#pragma unroll
    for (int c = 0; c < LANE_COLUMNS; c++) codes[c] = fmaf(codes[c], pair.x, pair.y);
#endif
#pragma unroll
    for (int m = 0; m < ROWS; m++) {
#if ROWS >= 4
#pragma unroll
        for (int c = 0; c < LANE_COLUMNS; c++) sums[m] = fmaf(codes[c], inputs[m][c], sums[m]);
#else
        float dot = 0.0f, input_sum = 0.0f;
#pragma unroll
        for (int c = 0; c < LANE_COLUMNS; c++) dot = fmaf(codes[c], inputs[m][c], dot), input_sum += inputs[m][c];
        sums[m] = fmaf(pair.x, dot, fmaf(pair.y, input_sum, sums[m]));
#endif
    }
}

// Adds `values` over the lanes of a warp; a lane keeps those from `first` on, at most ceil(COUNT / 32) and as many as
// `kept` says. Halving what is exchanged at each of 5 steps takes COUNT shuffles, not 5 COUNT.
template <int COUNT, int MASK>
DEVICE void sum_over_lanes(float (&values)[SUMS], int lane, int &first, int &kept) {
    constexpr int HALF = (COUNT + 1) / 2;
    bool upper = lane & MASK;
#pragma unroll
    for (int i = 0; i < HALF; i++) {
        float low = values[i], high = HALF + i < COUNT ? values[HALF + i] : 0.0f;
        float other = shuffle_xor(upper ? low : high, MASK);
        values[i] = (upper ? high : low) + other;
    }
    first += upper ? HALF : 0;
    kept = upper ? (kept > HALF ? kept - HALF : 0) : (kept < HALF ? kept : HALF);
    if constexpr (MASK > 1) sum_over_lanes<HALF, MASK / 2>(values, lane, first, kept);
}

KERNEL(32 * WARPS)
int3_gemv(const u16 *x, const u32 *packed, SCALE_PARAMETERS, ZERO_PARAMETERS, BIAS_PARAMETER int rows, int out,
          int columns, u16 *y) {
    SHARED float2 staged[STAGED_GROUPS * FIELDS];  // scale 2^(85 - p), -scale zero 2^-64; [group, field]
    SHARED float partial[WARPS * SUMS];
    const Scales scales = SCALE_ARGUMENTS;
    const Zeros zeros = ZERO_ARGUMENTS;
    int step = (out + FIELDS - 1) / FIELDS, groups = columns / GROUP;
    int word_row = blockIdx.x, first_row = blockIdx.y * ROWS;
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const u32 *words_row = packed + (long long)word_row * columns;
    float sums[SUMS] = {};

    for (int first_group = 0; first_group < groups; first_group += STAGED_GROUPS) {
        int staged_groups = groups - first_group < STAGED_GROUPS ? groups - first_group : STAGED_GROUPS;
        int last_span = (first_group + staged_groups) * SPANS_PER_GROUP;
        int index = first_group * SPANS_PER_GROUP + warp * 4 + lane / 8;
        u32 words[LANE_COLUMNS] = {};
        if (index < last_span) load_words(words, words_row, Span(index, lane % 8, columns));
        BLOCK_BARRIER();
        for (int i = threadIdx.x; i < FIELDS * staged_groups; i += 32 * WARPS) {
            int field = i / staged_groups, group = i % staged_groups, output = field * step + word_row;
            float2 pair = make_float2(0.0f, 0.0f);
            if (output < out) {
                long long at = (long long)output * groups + first_group + group;
                float scale = Scales::value(scales.bits(at)), zero = Zeros::value(zeros.bits(at));
                float power = as_float((127 + 85 - 12 + field % 5 * 3) << 23);  // 2^(85 - p), p = 12 - 3 (field % 5)
                pair = make_float2(scale * power, -scale * zero * 0x1p-64f);
            }
            staged[group * FIELDS + field] = pair;
        }
        BLOCK_BARRIER();

        for (; index < last_span; index += 4 * WARPS) {
            Span span(index, lane % 8, columns);
            u32 next[LANE_COLUMNS] = {};
            if (index + 4 * WARPS < last_span)
                load_words(next, words_row, Span(index + 4 * WARPS, lane % 8, columns));
            float inputs[ROWS][LANE_COLUMNS];
#pragma unroll
            for (int m = 0; m < ROWS; m++)
                load_inputs(inputs[m], x + (long long)(first_row + m) * columns, first_row + m < rows, span);
            const float2 *pairs = staged + (span.group - first_group) * FIELDS;
#pragma unroll
            for (int k = 0; k < FIELDS; k++) {
                float codes[LANE_COLUMNS];
#pragma unroll
                for (int c = 0; c < LANE_COLUMNS; c++)
                    codes[c] = as_float((k < 5 ? words[c] >> 15 : words[c]) & (7u << (12 - k % 5 * 3)));
                add_products(sums + k * ROWS, codes, inputs, pairs[k]);
            }
#pragma unroll
            for (int c = 0; c < LANE_COLUMNS; c++) words[c] = next[c];
        }
    }

    int first = 0, kept = SUMS;
    sum_over_lanes<SUMS, 16>(sums, lane, first, kept);
#pragma unroll
    for (int i = 0; i < (SUMS + 31) / 32; i++)
        if (i < kept) partial[warp * SUMS + first + i] = sums[i];
    BLOCK_BARRIER();
    for (int i = threadIdx.x; i < SUMS; i += 32 * WARPS) {
        int row = first_row + i % ROWS, output = i / ROWS * step + word_row;
        if (row >= rows || output >= out) continue;
        float sum = 0.0f;
        for (int w = 0; w < WARPS; w++) sum += partial[w * SUMS + i];
        y[(long long)row * out + output] = from_float(sum + BIAS_OF(output));
    }
}
#endif

#ifdef INT3_TILED
// TILE_ROWS rows and 8 word rows (80 outputs) in a block; output 8k + r of a tile is field k of word row r. A warp
// decodes a word row, two neighbouring columns a lane, with scales that it staged itself.

#define OUTPUTS (8 * FIELDS)
#define ITEMS (8 * 32 / TILE_THREADS)
#define TILE_GROUPS (GROUP % TILE_K == 0 ? 1 : TILE_K % GROUP == 0 ? TILE_K / GROUP : (TILE_K + GROUP - 2) / GROUP + 1)
#define LANE_PAIRS ((TILE_GROUPS * FIELDS + 31) / 32)

struct Int3Weights {
    const u32 *packed;
    Scales scales;
    Zeros zeros;
    int out, columns, first_word_row;
    float2 (*staged)[TILE_GROUPS * FIELDS];  // [8]: scale 2^-p, -scale zero; [group of the tile, field]
    u32 words[ITEMS][2];
    Scales::Bits scale_bits[ITEMS][LANE_PAIRS];
    Zeros::Bits zero_bits[ITEMS][LANE_PAIRS];

    // Where pair `i` of the lane lies in scale and zero; -1 where there is none.
    DEVICE_MEMBER long long pair_index(int word_row, int first_column, int i) const {
        int pair = threadIdx.x % 32 + 32 * i, group = first_column / GROUP + pair / FIELDS;
        int step = (out + FIELDS - 1) / FIELDS, groups = columns / GROUP, output = pair % FIELDS * step + word_row;
        bool exists = pair < TILE_GROUPS * FIELDS && word_row < step && group < groups && output < out;
        return exists ? (long long)output * groups + group : -1;
    }

    DEVICE_MEMBER void fetch(int first_column) {
        int step = (out + FIELDS - 1) / FIELDS;
#pragma unroll
        for (int item = 0; item < ITEMS; item++) {
            int word_row = first_word_row + (threadIdx.x + item * TILE_THREADS) / 32;
            int column = first_column + threadIdx.x % 32 * 2;
            const u32 *from = packed + (long long)word_row * columns + column;
            bool inside = word_row < step && column < columns;
            if (columns % 2 == 0) {
                uint2 v = load_stream((const uint2 *)from, inside);
                words[item][0] = v.x, words[item][1] = v.y;
            } else {
                words[item][0] = inside ? from[0] : 0;
                words[item][1] = inside && column + 1 < columns ? from[1] : 0;
            }
#pragma unroll
            for (int i = 0; i < LANE_PAIRS; i++) {
                long long at = pair_index(word_row, first_column, i);
                if (at >= 0) scale_bits[item][i] = scales.bits(at), zero_bits[item][i] = zeros.bits(at);
            }
        }
    }

    // A barrier of the block lies between a step's reads of `staged` and the next step's writes.
    DEVICE_MEMBER void store(u16 *tile, int first_column) {
#pragma unroll
        for (int item = 0; item < ITEMS; item++) {
            int row = (threadIdx.x + item * TILE_THREADS) / 32;
#pragma unroll
            for (int i = 0; i < LANE_PAIRS; i++) {
                int pair = threadIdx.x % 32 + 32 * i, p = 12 - pair % FIELDS % 5 * 3;
                float2 value = make_float2(0.0f, 0.0f);
                if (pair_index(first_word_row + row, first_column, i) >= 0) {
                    float scale = Scales::value(scale_bits[item][i]);
                    value = make_float2(scale * as_float((127 - p) << 23), -scale * Zeros::value(zero_bits[item][i]));
                }
                if (pair < TILE_GROUPS * FIELDS) staged[row][pair] = value;
            }
        }
        WARP_BARRIER();
#pragma unroll
        for (int item = 0; item < ITEMS; item++) {
            int row = (threadIdx.x + item * TILE_THREADS) / 32, column = threadIdx.x % 32 * 2;
            const float4 *pairs[2];  // two fields each
#pragma unroll
            for (int c = 0; c < 2; c++) {
                int group = (first_column + column + c) / GROUP - first_column / GROUP;
                pairs[c] = (const float4 *)(staged[row] + group * FIELDS);
            }
            u16 *to = tile + tile_offset<OUTPUTS>(row, column);
#pragma unroll
            for (int k = 0; k < FIELDS; k++) {
                float values[2];
#pragma unroll
                for (int c = 0; c < 2; c++) {
                    u32 bits = (k < 5 ? words[item][c] >> 15 : words[item][c]) & (7u << (12 - k % 5 * 3));
                    float code = as_float(bits | 0x4b000000u) - 0x1p23f;  // q 2^p, exact: the number was 2^23 + q 2^p
                    float4 two = pairs[GROUP % 2 == 0 ? 0 : c][k / 2];
                    values[c] = fmaf(code, k % 2 ? two.z : two.x, k % 2 ? two.w : two.y);
                }
                *(u32 *)(to + 8 * k * 32) = pack(values[0], values[1]);
            }
        }
    }
};

KERNEL(TILE_THREADS)
int3_tiled(const u16 *x, const u32 *packed, SCALE_PARAMETERS, ZERO_PARAMETERS, BIAS_PARAMETER int rows, int out,
           int columns, u16 *y) {
    SHARED Tiles<OUTPUTS> tiles;
    SHARED float2 staged[8][TILE_GROUPS * FIELDS];
    int step = (out + FIELDS - 1) / FIELDS, first_word_row = blockIdx.x * 8;
    Int3Weights weights{packed, SCALE_ARGUMENTS, ZERO_ARGUMENTS, out, columns, first_word_row, staged};
    auto emit = [=](int row, int output, float sum) {
        int word_row = first_word_row + output % 8, o = output / 8 * step + word_row;
        if (row < rows && word_row < step && o < out) y[(long long)row * out + o] = from_float(sum + BIAS_OF(o));
    };
    tiled_product<OUTPUTS>(tiles, x, rows, columns, blockIdx.y * TILE_ROWS, weights, emit);
}
#endif
