// y tile [TILE_ROWS, OUTPUTS] = x [rows, columns] w^T by tensor cores, w decoded tile by tile into shared memory.
//
// A step takes TILE_K columns. Warps stand 2 along the outputs, 2 along the columns of a step and TILE_ROWS / 32 along
// the rows; the two halves along the columns are added at the end, always in the same order.
//
// Tiles lie in two parts of 32 columns, rows of 64 bytes. Fragments are read as 16 bytes a lane: lane t of a row takes
// columns 8t .. 8t + 7 of both operands and calls them k = 2t, 2t + 1, 2t + 8, 2t + 9 of two products; a product does
// not mind in which order its k are numbered, and these reads meet no bank twice.

#ifndef TILE_ROWS
#define TILE_ROWS 64
#endif
#define TILE_K 64
#define TILE_THREADS (4 * TILE_ROWS)

DEVICE constexpr int cdiv(int a, int b) { return (a + b - 1) / b; }

// Offset of an element in a tile of `height` rows; the second part starts 64 bytes off, so that a row fills all banks.
template <int HEIGHT>
DEVICE int tile_offset(int row, int column) {
    return (column / 32) * (HEIGHT * 32 + 32) + row * 32 + column % 32;
}

template <int OUTPUTS>
struct Tiles {
    u16 x[2][2 * (TILE_ROWS * 32 + 32)];
    u16 w[2][2 * (OUTPUTS * 32 + 32)];
};

// The next step's activations: 16 of them a thread, in registers until their tile is free.
struct ActivationLoads {
    uint4 parts[2];

    DEVICE_MEMBER void fetch(const u16 *x, int rows, int columns, int first_row, int first_column) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            int item = threadIdx.x + i * TILE_THREADS;
            int row = first_row + item / 8, column = first_column + item % 8 * 8;
            const u16 *from = x + (long long)row * columns + column;
            parts[i] = make_uint4(0, 0, 0, 0);
            if (row >= rows || column >= columns) continue;
            if (columns % 8 == 0) {
                parts[i] = *(const uint4 *)from;
            } else {
                u32 words[4];
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    u32 low = column + 2 * j < columns ? from[2 * j] : 0;
                    u32 high = column + 2 * j + 1 < columns ? from[2 * j + 1] : 0;
                    words[j] = low | high << 16;
                }
                parts[i] = make_uint4(words[0], words[1], words[2], words[3]);
            }
        }
    }

    DEVICE_MEMBER void store(u16 *tile) const {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            int item = threadIdx.x + i * TILE_THREADS;
            *(uint4 *)(tile + tile_offset<TILE_ROWS>(item / 8, item % 8 * 8)) = parts[i];
        }
    }
};

// One warp's share of a step: 32 rows, OUTPUTS / 2 outputs, 32 columns.
template <int OUTPUTS>
DEVICE void multiply(float (&sums)[2][OUTPUTS / 16][4], const u16 *x, const u16 *w, int warp, int lane) {
    int part = warp / 2 % 2, first_row = warp / 4 * 32, first_output = warp % 2 * (OUTPUTS / 2);
    int g = lane / 4, t = lane % 4;
    uint4 a[2][2];
#pragma unroll
    for (int i = 0; i < 4; i++)
        a[i / 2][i % 2] = *(const uint4 *)(x + tile_offset<TILE_ROWS>(first_row + 8 * i + g, part * 32 + 8 * t));
#pragma unroll
    for (int j = 0; j < OUTPUTS / 16; j++) {
        uint4 b = *(const uint4 *)(w + tile_offset<OUTPUTS>(first_output + 8 * j + g, part * 32 + 8 * t));
#pragma unroll
        for (int i = 0; i < 2; i++) {
            mma(sums[i][j], {a[i][0].x, a[i][1].x, a[i][0].y, a[i][1].y}, {b.x, b.y});
            mma(sums[i][j], {a[i][0].z, a[i][1].z, a[i][0].w, a[i][1].w}, {b.z, b.w});
        }
    }
}

// Weights: fetch(first_column) starts the loads of a step, store(tile, first_column) decodes them into a tile.
// emit(row, output of the tile, sum) is called once for each element of the y tile, tails included.
template <int OUTPUTS, class Weights, class Emit>
DEVICE void tiled_product(Tiles<OUTPUTS> &tiles, const u16 *x, int rows, int columns, int first_row, Weights &weights,
                          Emit emit) {
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    float sums[2][OUTPUTS / 16][4] = {};
    ActivationLoads activations;
    activations.fetch(x, rows, columns, first_row, 0);
    weights.fetch(0);
    // Two buffers and one barrier a step: a buffer is written again only after a barrier that follows its last reads.
    for (int column = 0, buffer = 0; column < columns; column += TILE_K, buffer ^= 1) {
        activations.store(tiles.x[buffer]);
        weights.store(tiles.w[buffer], column);
        BLOCK_BARRIER();
        if (column + TILE_K < columns) {
            activations.fetch(x, rows, columns, first_row, column + TILE_K);
            weights.fetch(column + TILE_K);
        }
        multiply<OUTPUTS>(sums, tiles.x[buffer], tiles.w[buffer], warp, lane);
    }
    BLOCK_BARRIER();
    constexpr int COUNT = OUTPUTS / 2;  // sums of a lane
    static_assert(sizeof(float) * TILE_ROWS / 16 * 32 * COUNT <= sizeof(Tiles<OUTPUTS>), "sums do not fit");
    float *shared = (float *)&tiles + (warp / 4 * 2 + warp % 2) * 32 * COUNT + lane;
    bool second = warp / 2 % 2;
#pragma unroll
    for (int i = 0; i < COUNT; i++)
        if (second) shared[32 * i] = sums[i / (COUNT / 2)][i % (COUNT / 2) / 4][i % 4];
    BLOCK_BARRIER();
    if (second) return;
#pragma unroll
    for (int i = 0; i < COUNT; i++) {
        int row = first_row + warp / 4 * 32 + i / (COUNT / 2) * 16 + lane / 4 + i % 4 / 2 * 8;
        int output = warp % 2 * (OUTPUTS / 2) + i % (COUNT / 2) / 4 * 8 + lane % 4 * 2 + i % 2;
        emit(row, output, sums[i / (COUNT / 2)][i % (COUNT / 2) / 4][i % 4] + shared[32 * i]);
    }
}
