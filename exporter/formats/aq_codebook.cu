// y [rows, out] = x [rows, columns] w^T (+ bias), w a sum of codebook entries (additive quantization):
//
//     w[o OG + a, j IG + b] = scale * SUM over m of codebooks[m, codes[o, j, m], a, b]
//     codes [out / OG, columns / IG, M]     unsigned, in 1 byte (BITS <= 8) or 2 (up to 16, low byte first)
//     codebooks [M, 2^BITS, OG, IG]         activations' type
//     scales [out / OG, 1], or [out / OG, columns / IG] with GROUP_SCALES, activations' type
//
// Compile time: BF16, M = NUM_CODEBOOKS, BITS, OG = OUT_GROUP, IG = IN_GROUP, and, each 0 or 1, GROUP_SCALES, BIAS
// and ALIGNED_CODES (16 bytes divide the codes of an output group).
// Parameters: inputs, sizes, output. A scale per output is applied to the finished sum.
//
// Weights are decoded in runs of neighbours in a row; where IN_GROUP divides by the run it lies in one entry.

#define QUADS (IN_GROUP % 4 == 0)
#define ENTRIES (1 << BITS)
#define BOOK_SIZE (NUM_CODEBOOKS * ENTRIES * OUT_GROUP * IN_GROUP)
#define RUN (IN_GROUP % 8 == 0 ? 8 : 4)  // weights that a thread decodes at once, but for the GEMV's fragments of 4
#define RUN_CODES (QUADS ? NUM_CODEBOOKS : 4 * NUM_CODEBOOKS)

#if BITS <= 8
typedef u8 Code;
#else
typedef u16 Code;
#endif

#if BIAS
#define BIAS_PARAMETER const u16 *bias,
#define BIAS_OF(output) to_float(bias[output])
#else
#define BIAS_PARAMETER
#define BIAS_OF(output) 0.0f
#endif
#if GROUP_SCALES
#define EPILOGUE_SCALE(output) 1.0f
#else
#define EPILOGUE_SCALE(output) to_float(scales[(output) / OUT_GROUP])
#endif

// Copies the codebooks to `shared` where a kernel gave them room, and says where to read them.
DEVICE const u16 *place_codebooks(u16 *shared, bool fits, const u16 *codebooks, int threads) {
    if (!fits) return codebooks;
    for (int i = threadIdx.x; i < BOOK_SIZE; i += threads) shared[i] = codebooks[i];
    BLOCK_BARRIER();
    return shared;
}

// The codes behind a run of weights of output o from `column` on, a multiple of the run; o < out.
DEVICE void load_codes(u16 (&found)[RUN_CODES], const Code *codes, int o, int column, int columns) {
#pragma unroll
    for (int i = 0; i < RUN_CODES; i++) {
        int at = column + i / NUM_CODEBOOKS;
        long long entry = (long long)(o / OUT_GROUP) * (columns / IN_GROUP) + at / IN_GROUP;
        found[i] = at < columns ? codes[entry * NUM_CODEBOOKS + i % NUM_CODEBOOKS] : 0;
    }
}

// Where the weights of a code lie that stand at (o, column).
DEVICE const u16 *entry_of(const u16 *books, int book, int code, int o, int column) {
    return books + ((book * ENTRIES + code) * OUT_GROUP + o % OUT_GROUP) * IN_GROUP + column % IN_GROUP;
}

// A run of weights, scaled per group where there are such scales; zero past the last column.
template <int COUNT>
DEVICE void decode(float (&w)[COUNT], const u16 (&codes)[RUN_CODES], const u16 *books, const u16 *scales, int o,
                   int column, int columns) {
#pragma unroll
    for (int c = 0; c < COUNT; c++) w[c] = 0.0f;
#pragma unroll
    for (int m = 0; m < NUM_CODEBOOKS; m++) {
#if QUADS
        const u16 *entry = entry_of(books, m, codes[m], o, column);
        u32 words[4];
        if constexpr (COUNT == 8) {
            uint4 v = *(const uint4 *)entry;
            words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w;
        } else {
            uint2 v = *(const uint2 *)entry;
            words[0] = v.x, words[1] = v.y;
        }
#pragma unroll
        for (int c = 0; c < COUNT; c++) w[c] += to_float((u16)(words[c / 2] >> c % 2 * 16));
#else
#pragma unroll
        for (int c = 0; c < COUNT; c++)
            if (column + c < columns)
                w[c] += to_float(*entry_of(books, m, codes[c * NUM_CODEBOOKS + m], o, column + c));
#endif
    }
#if GROUP_SCALES
    const u16 *row = scales + (long long)(o / OUT_GROUP) * (columns / IN_GROUP);
#pragma unroll
    for (int c = 0; c < COUNT; c++)
        if (column + c < columns) w[c] *= to_float(row[(column + c) / IN_GROUP]);
#endif
}

// Writes a run of weights, rounded.
template <int COUNT>
DEVICE void store_run(u16 *to, const float (&w)[COUNT]) {
    if constexpr (COUNT == 8)
        *(uint4 *)to = make_uint4(pack(w[0], w[1]), pack(w[2], w[3]), pack(w[4], w[5]), pack(w[6], w[7]));
    else
        *(uint2 *)to = make_uint2(pack(w[0], w[1]), pack(w[2], w[3]));
}

#ifdef CODEBOOK_GEMV
// Up to 8 rows of x and 16 outputs in a block, through tensor cores: 8 warps share the columns, a lane decodes its
// fragments straight into registers, and the codebooks of a weight add up in the accumulator.
//
// LANES lanes share an entry of IN_GROUP weights, four weights each; in a round of STEPS products of 16 columns a lane
// keeps to STEPS entries that follow one another in the codes, so that 16 bytes of codes come with one load.
//
// Codebooks of up to 256 entries lie in shared memory as SLOTS copies, one code in 128 bytes (all banks). The lanes
// that are served together read different slots, so that no two of them meet in a bank, whatever the codes are: a lane
// starts with the codebook of its slot and goes round, as the order in which codebooks are added does not matter.

#define WARPS 8
#define MOST_ROWS 8
#define BLOCK_OUTPUTS 16
#define LANES (IN_GROUP == 4 ? 1 : IN_GROUP == 8 ? 2 : 4)
#define SLOTS (16 / LANES)
#define CODE_BYTES (BITS <= 8 ? 1 : 2)
#define STEP_BYTES (NUM_CODEBOOKS * CODE_BYTES)
#define VECTOR_CODES \
    ((IN_GROUP == 4 || IN_GROUP == 8 || IN_GROUP == 16) && (STEP_BYTES == 1 || STEP_BYTES == 2 || STEP_BYTES == 4))
#define STEPS (VECTOR_CODES ? 16 / STEP_BYTES : 4)
#define SLOTTED (VECTOR_CODES && BITS <= 8 && OUT_GROUP == 1 && !GROUP_SCALES && SLOTS % NUM_CODEBOOKS == 0)
#define COPIES (SLOTS / NUM_CODEBOOKS)
#define BOOKS_FIT (!SLOTTED && BOOK_SIZE <= 20480)
#define BOOK_ROOM (SLOTTED ? ENTRIES * 64 : BOOKS_FIT ? BOOK_SIZE : 8)
#define TERMS (GROUP_SCALES || !QUADS ? 1 : NUM_CODEBOOKS)  // products a step: one a codebook, or one of their sum

// Codes of a lane's STEPS entries of one output, or nothing where they are loaded one by one.
struct LaneCodes {
    u32 words[4];

    DEVICE_MEMBER void load(const Code *codes, int o, int entry, int entries) {
#if VECTOR_CODES
        const Code *from = codes + ((long long)(o / OUT_GROUP) * entries + entry) * NUM_CODEBOOKS;
#if ALIGNED_CODES
        uint4 v = load_stream((const uint4 *)from, entry < entries);
        words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w;
#else
#pragma unroll
        for (int i = 0; i < 4; i++) words[i] = 0;
#pragma unroll
        for (int i = 0; i < STEPS * NUM_CODEBOOKS; i++)
            if (entry + i / NUM_CODEBOOKS < entries)
                words[i * CODE_BYTES / 4] |= (u32)from[i] << i * CODE_BYTES % 4 * 8;
#endif
#endif
    }

    // Code of `book` at a step; codes of one step never straddle a word.
    DEVICE_MEMBER int code(int step, int book) const {
        u32 word = words[step * STEP_BYTES / 4];
        int index = step * STEP_BYTES % 4 + book * CODE_BYTES;
        return CODE_BYTES == 1 ? byte_of(word, index) : word >> 8 * index & 0xffff;
    }
};

DEVICE void fill_slots(u16 *shared, const u16 *codebooks) {
    for (int i = threadIdx.x; i < ENTRIES * SLOTS; i += 32 * WARPS) {
        const u16 *from = codebooks + (i % SLOTS / COPIES * ENTRIES + i / SLOTS) * IN_GROUP;
#pragma unroll
        for (int b = 0; b < IN_GROUP; b += 4) *(uint2 *)(shared + i * IN_GROUP + b) = *(const uint2 *)(from + b);
    }
    BLOCK_BARRIER();
}

// Which codebook a lane takes as its term, and at which of a code's 128 bytes.
struct Slot {
    int book, offset;

    DEVICE_MEMBER Slot(int term, int lane) {
        int slot = lane % 16 / LANES;
        book = (term + slot / COPIES) % NUM_CODEBOOKS;
        offset = 2 * ((book * COPIES + slot % COPIES) * IN_GROUP + lane % LANES * 4);
    }
};

// Term `term` of the lane's four weights of output o at a step.
DEVICE uint2 weight_fragment(const LaneCodes &lane_codes, const Code *codes, const u16 *books, const u16 *scales,
                             int step, int term, int o, int column, int columns, int lane) {
#if SLOTTED
    Slot slot(term, lane);  // the same at every step: computed once
    return *(const uint2 *)((const char *)books + lane_codes.code(step, slot.book) * 128 + slot.offset);
#elif VECTOR_CODES && !GROUP_SCALES
    return *(const uint2 *)entry_of(books, term, lane_codes.code(step, term), o, column);
#else
    if (column >= columns) return make_uint2(0, 0);
    u16 found[RUN_CODES];
    load_codes(found, codes, o, column, columns);
#if QUADS && !GROUP_SCALES
    return *(const uint2 *)entry_of(books, term, found[term], o, column);
#else
    float w[4];
    decode(w, found, books, scales, o, column, columns);
    return make_uint2(pack(w[0], w[1]), pack(w[2], w[3]));
#endif
#endif
}

// Four inputs of a row from a column on, zero outside.
DEVICE uint2 input_fragment(const u16 *from, bool exists, int column, int columns) {
#if QUADS
    return load_cached((const uint2 *)from, exists && column < columns);
#else
    u32 values[4];
#pragma unroll
    for (int c = 0; c < 4; c++) values[c] = exists && column + c < columns ? from[c] : 0;
    return make_uint2(values[0] | values[1] << 16, values[2] | values[3] << 16);
#endif
}

KERNEL(32 * WARPS)
codebook_gemv(const u16 *x, const Code *codes, const u16 *codebooks, const u16 *scales, BIAS_PARAMETER int rows,
              int out, int columns, u16 *y) {
    SHARED u16 shared_books[BOOK_ROOM];
    SHARED float partial[WARPS][4][32];
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    int first_output = blockIdx.x * BLOCK_OUTPUTS, first_row = blockIdx.y * MOST_ROWS;
    int entries = columns / IN_GROUP;
    int outputs[2] = {first_output + g, first_output + g + 8};
#pragma unroll
    for (int i = 0; i < 2; i++) outputs[i] = outputs[i] < out ? outputs[i] : out - 1;  // decoded twice, stored once
    const u16 *x_row = x + (long long)(first_row + g) * columns;
    bool row_exists = first_row + g < rows;

    // Round r covers columns 16 STEPS r and on; the lane's entries in it follow one another.
    int rounds = (columns + 16 * STEPS - 1) / (16 * STEPS), lane_entry = t / LANES * STEPS;
    constexpr int ROUND_ENTRIES = 4 / LANES * STEPS;
    LaneCodes lane_codes[2] = {};
#pragma unroll
    for (int i = 0; i < 2; i++)
        if (warp < rounds) lane_codes[i].load(codes, outputs[i], warp * ROUND_ENTRIES + lane_entry, entries);
#if SLOTTED
    fill_slots(shared_books, codebooks);
    const u16 *books = shared_books;
#else
    const u16 *books = place_codebooks(shared_books, BOOKS_FIT, codebooks, 32 * WARPS);
#endif

    float sums[4] = {};
    for (int round = warp; round < rounds; round += WARPS) {
        LaneCodes next[2] = {};
#pragma unroll
        for (int i = 0; i < 2; i++)
            if (round + WARPS < rounds)
                next[i].load(codes, outputs[i], (round + WARPS) * ROUND_ENTRIES + lane_entry, entries);
        int lane_column = round * 16 * STEPS + lane_entry * 4 * LANES + t % LANES * 4;
        const u16 *from = x_row + lane_column;
#pragma unroll
        for (int step = 0; step < STEPS; step++) {
            int column = lane_column + step * 4 * LANES;
            // Aligned codes are all inside or all outside: the first column decides for every step.
            int deciding = VECTOR_CODES && ALIGNED_CODES ? lane_column : column;
            uint2 b = input_fragment(from + step * 4 * LANES, row_exists, deciding, columns);
#pragma unroll
            for (int term = 0; term < TERMS; term++) {
                uint2 a[2];
#pragma unroll
                for (int i = 0; i < 2; i++)
                    a[i] = weight_fragment(lane_codes[i], codes, books, scales, step, term, outputs[i], column,
                                           columns, lane);
                mma(sums, {a[0].x, a[1].x, a[0].y, a[1].y}, {b.x, b.y});
            }
        }
#pragma unroll
        for (int i = 0; i < 2; i++) lane_codes[i] = next[i];
    }

#pragma unroll
    for (int i = 0; i < 4; i++) partial[warp][i][lane] = sums[i];
    BLOCK_BARRIER();
    for (int i = threadIdx.x; i < 128; i += 32 * WARPS) {
        int part = i / 32, from = i % 32;
        int output = first_output + from / 4 + part / 2 * 8, row = first_row + from % 4 * 2 + part % 2;
        if (row >= rows || output >= out) continue;
        float sum = 0.0f;
        for (int w = 0; w < WARPS; w++) sum += partial[w][part][from];
        y[(long long)row * out + output] = from_float(fmaf(sum, EPILOGUE_SCALE(output), BIAS_OF(output)));
    }
}
#endif

#ifdef CODEBOOK_LOOKUP
// One row of x in a block: for every entry of every codebook its dot product with a group of inputs is worked out once
// and looked up by all the outputs of the block, so that an output costs one read and one addition a code. Pays where
// a block has many more outputs than a codebook has entries: few bits, wide outputs, long groups. BITS <= 8.

#define LOOKUP_THREADS 256
#define LOOKUP_GROUPS 4  // output groups of a thread
#define TABLE_SIZE (NUM_CODEBOOKS * ENTRIES * OUT_GROUP)
#define TABLES (TABLE_SIZE <= 1024 ? 8 : TABLE_SIZE <= 2048 ? 4 : 1)

KERNEL(LOOKUP_THREADS)
codebook_lookup(const u16 *x, const Code *codes, const u16 *codebooks, const u16 *scales, BIAS_PARAMETER int rows,
                int out, int columns, u16 *y) {
    SHARED float tables[TABLES][TABLE_SIZE];  // [input group][codebook, entry, row of the entry]
    int row = blockIdx.y, entries = columns / IN_GROUP, out_groups = out / OUT_GROUP;
    int first = blockIdx.x * LOOKUP_THREADS * LOOKUP_GROUPS + threadIdx.x;
    const u16 *x_row = x + (long long)row * columns;
    float sums[LOOKUP_GROUPS][OUT_GROUP] = {};
    for (int first_entry = 0; first_entry < entries; first_entry += TABLES) {
        int count = entries - first_entry < TABLES ? entries - first_entry : TABLES;
        BLOCK_BARRIER();
        for (int i = threadIdx.x; i < count * TABLE_SIZE; i += LOOKUP_THREADS) {
            const u16 *entry = codebooks + i % TABLE_SIZE * IN_GROUP;
            const u16 *inputs = x_row + (first_entry + i / TABLE_SIZE) * IN_GROUP;
            float dot = 0.0f;
#pragma unroll
            for (int b = 0; b < IN_GROUP; b++) dot = fmaf(to_float(inputs[b]), to_float(entry[b]), dot);
            tables[i / TABLE_SIZE][i % TABLE_SIZE] = dot;
        }
        BLOCK_BARRIER();
#pragma unroll
        for (int n = 0; n < LOOKUP_GROUPS; n++) {
            int o = first + n * LOOKUP_THREADS;
            if (o >= out_groups) continue;
            const Code *from = codes + ((long long)o * entries + first_entry) * NUM_CODEBOOKS;
            for (int j = 0; j < count; j++) {
                float scale = GROUP_SCALES ? to_float(scales[(long long)o * entries + first_entry + j]) : 1.0f;
#pragma unroll
                for (int a = 0; a < OUT_GROUP; a++) {
                    float dot = 0.0f;
#pragma unroll
                    for (int m = 0; m < NUM_CODEBOOKS; m++)
                        dot += tables[j][(m * ENTRIES + from[j * NUM_CODEBOOKS + m]) * OUT_GROUP + a];
                    sums[n][a] = fmaf(scale, dot, sums[n][a]);
                }
            }
        }
    }
#pragma unroll
    for (int n = 0; n < LOOKUP_GROUPS; n++)
#pragma unroll
        for (int a = 0; a < OUT_GROUP; a++) {
            int output = (first + n * LOOKUP_THREADS) * OUT_GROUP + a;
            if (output < out)
                y[(long long)row * out + output] =
                    from_float(fmaf(sums[n][a], EPILOGUE_SCALE(output), BIAS_OF(output)));
        }
}
#endif

#ifdef CODEBOOK_TILED
// TILE_ROWS rows and 64 outputs in a block; weights are decoded a run at a time and rounded once to activations' type.

#define OUTPUTS 64
#define ITEMS (OUTPUTS * TILE_K / RUN / TILE_THREADS)
#define TILED_BOOKS_FIT (BOOK_SIZE <= 7168)

struct CodebookWeights {
    const Code *codes;
    const u16 *books, *scales;
    int out, columns, first_output;
    u16 found[ITEMS][RUN_CODES];

    DEVICE_MEMBER int output_of(int item) const {
        int output = first_output + (threadIdx.x + item * TILE_THREADS) / (TILE_K / RUN);
        return output < out ? output : out - 1;
    }
    DEVICE_MEMBER static int column_of(int item) {
        return (threadIdx.x + item * TILE_THREADS) % (TILE_K / RUN) * RUN;
    }

    DEVICE_MEMBER void fetch(int first_column) {
#pragma unroll
        for (int i = 0; i < ITEMS; i++) load_codes(found[i], codes, output_of(i), first_column + column_of(i), columns);
    }

    DEVICE_MEMBER void store(u16 *tile, int first_column) const {
#pragma unroll
        for (int i = 0; i < ITEMS; i++) {
            float w[RUN] = {};
            int column = first_column + column_of(i);
            if (column < columns) decode(w, found[i], books, scales, output_of(i), column, columns);
            int row = (threadIdx.x + i * TILE_THREADS) / (TILE_K / RUN);
            store_run(tile + tile_offset<OUTPUTS>(row, column_of(i)), w);
        }
    }
};

KERNEL(TILE_THREADS)
codebook_tiled(const u16 *x, const Code *codes, const u16 *codebooks, const u16 *scales, BIAS_PARAMETER int rows,
               int out, int columns, u16 *y) {
    SHARED Tiles<OUTPUTS> tiles;
    SHARED u16 shared_books[TILED_BOOKS_FIT ? BOOK_SIZE : 8];
    const u16 *books = place_codebooks(shared_books, TILED_BOOKS_FIT, codebooks, TILE_THREADS);
    int first_output = blockIdx.x * OUTPUTS;
    CodebookWeights weights{codes, books, scales, out, columns, first_output};
    auto emit = [=](int row, int output, float sum) {
        int o = first_output + output;
        if (row < rows && o < out)
            y[(long long)row * out + o] = from_float(fmaf(sum, EPILOGUE_SCALE(o), BIAS_OF(o)));
    };
    tiled_product<OUTPUTS>(tiles, x, rows, columns, blockIdx.y * TILE_ROWS, weights, emit);
}
#endif

#ifdef CODEBOOK_DECODE
// weight [out, columns]: what a convolution needs. A block writes 16 outputs by 256 runs.

#define DECODE_THREADS 256
#define DECODE_OUTPUTS 16
#define DECODE_BOOKS_FIT (BOOK_SIZE <= 8192)

KERNEL(DECODE_THREADS)
codebook_decode(const Code *codes, const u16 *codebooks, const u16 *scales, int out, int columns, u16 *weight) {
    SHARED u16 shared_books[DECODE_BOOKS_FIT ? BOOK_SIZE : 8];
    const u16 *books = place_codebooks(shared_books, DECODE_BOOKS_FIT, codebooks, DECODE_THREADS);
    int column = (blockIdx.y * DECODE_THREADS + threadIdx.x) * RUN;
    for (int i = 0; i < DECODE_OUTPUTS; i++) {
        int o = blockIdx.x * DECODE_OUTPUTS + i;
        if (o >= out || column >= columns) break;
        u16 found[RUN_CODES];
        float w[RUN];
        load_codes(found, codes, o, column, columns);
        decode(w, found, books, scales, o, column, columns);
#pragma unroll
        for (int c = 0; c < RUN; c++) w[c] *= EPILOGUE_SCALE(o);
        u16 *to = weight + (long long)o * columns + column;
        if (columns % RUN == 0) {
            store_run(to, w);
        } else {
#pragma unroll
            for (int c = 0; c < RUN; c++)
                if (column + c < columns) to[c] = from_float(w[c]);
        }
    }
}
#endif
