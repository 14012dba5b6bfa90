// Products of fp32 matrices on AMX (Intel's matrix instructions), which multiply bf16 and add in fp32.
//
// A number a is the sum of two bf16, high(a) + low(a), to 16 bits of its mantissa; of the four products of the parts of
// a and b three are taken, low(a) low(b) is below the rounding of the others. split_products.py calls it.
//
// Legend: M pixels (rows of the output), N output channels, C input channels, T taps of a filter, K = T C. A tile is
// what one register of AMX holds: 16 rows of 32 bf16, or of 16 fp32.

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace {

constexpr long TILE = 16 * 32;     // bf16 of a tile
constexpr long BLOCK_K = 384;      // what is split at a time: 32 pixels of it are 48 KiB, which a core's first cache holds
constexpr long BLOCK_N = 512;      // channels that take their turn with it: 768 KiB of filters, for the second cache
constexpr long STEP = 4 * TILE;    // bf16 of 32 rows or columns by 32 of K: two tiles, each with its high and its low part
constexpr int XFEATURE_TILES = 18;  // what the kernel calls the registers of AMX
constexpr int ARCH_REQ_XCOMP_PERM = 0x1023;

struct alignas(64) TileConfig {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes_per_row[16] = {};
    uint8_t rows[16] = {};
};

// GCC does not know what memory the instructions of AMX read and write: what was written to it before is there from here
// on, and what is read after is read anew.
inline void settle(const void* memory) { __asm__ volatile("" : : "r"(memory) : "memory"); }

// The registers of AMX, set up for whole tiles; what they were set up for before is put back, for other libraries' sake.
class Tiles {
  public:
    Tiles() {
        TileConfig whole;
        std::fill_n(whole.bytes_per_row, 8, 64);
        std::fill_n(whole.rows, 8, 16);
        settle(&whole);
        settle(&before_);
        _tile_storeconfig(&before_);
        settle(&before_);
        _tile_loadconfig(&whole);
    }
    ~Tiles() {
        if (before_.palette) _tile_loadconfig(&before_);
        else _tile_release();
    }

  private:
    TileConfig before_;
};

__m512 to_fp32(__m256i bf16) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bf16), 16)); }

// 32 numbers as their high and low parts
void split(const float* from, uint16_t* high, uint16_t* low) {
    const __m512 a = _mm512_loadu_ps(from), b = _mm512_loadu_ps(from + 16);
    const __m512i both = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(b, a));
    const __m512 rest_a = _mm512_sub_ps(a, to_fp32(_mm512_castsi512_si256(both)));
    const __m512 rest_b = _mm512_sub_ps(b, to_fp32(_mm512_extracti64x4_epi64(both, 1)));
    _mm512_store_si512(high, both);
    _mm512_store_si512(low, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(rest_b, rest_a)));
}

// What a product reads: images of `height` x `width` pixels of `channels` numbers, pixel after pixel; and where the
// filters' taps lie: output pixel (i, j) of out_height x out_width multiplies input pixel (stride i + dy, stride j + dx),
// zero outside of the image. channels and outputs are multiples of 32.
struct Geometry {
    long images, height, width, channels, out_height, out_width, outputs, stride, taps;
    const long *dy, *dx;
};

// An output pixel: its image, and the input pixel that its filter's middle lies on.
struct Pixel {
    long image = 0, i = 0, j = 0;

    void next(const Geometry& g) {
        j += g.stride;
        if (j < g.out_width * g.stride) return;
        j = 0;
        i += g.stride;
        if (i < g.out_height * g.stride) return;
        i = 0;
        image++;
    }
};

// What the filters see, from first_k to end_k, of x around `rows` output pixels from `pixel` on, which is moved on;
// in two parts, as `multiply` reads it. Rows up to 32 are filled up with zeros.
void gather(const float* x, const Geometry& g, Pixel& pixel, long rows, long first_k, long end_k, uint16_t* block) {
    const long first_tap = first_k / g.channels;
    for (long row = 0; row < 32; row++) {
        uint16_t* to = block + row / 16 * 2 * TILE + row % 16 * 32;
        for (long tap = first_tap, k = first_k; k < end_k; tap++) {
            const long i = pixel.i + g.dy[tap], j = pixel.j + g.dx[tap];
            const bool is_inside = row < rows && i >= 0 && i < g.height && j >= 0 && j < g.width;
            const float* from = x + ((pixel.image * g.height + i) * g.width + j - tap) * g.channels + k;
            for (const long end = std::min((tap + 1) * g.channels, end_k); k < end; k += 32, from += 32, to += STEP) {
                if (is_inside) {
                    split(from, to, to + TILE);
                } else {
                    std::memset(to, 0, 64);
                    std::memset(to + TILE, 0, 64);
                }
            }
        }
        if (row < rows) pixel.next(g);
    }
}

// C in tiles 0 .. 3 (2 x 2) += A in 4 and 5 (2 x 1) times B in 6 and 7 (1 x 2)
inline void add_products() {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
}

// C (rows x 32, rows <= 32; its rows `pitch` numbers apart) = A (32 x 32 steps) B^T, STEP after STEP, on top of C where
// `adds`, else of bias (32), the same for every row, or of zero where that is null.
void multiply(
    const uint16_t* a, const uint16_t* b, long steps, bool adds, const float* bias, float* c, long pitch, long rows
) {
    alignas(64) float edge[32 * 32];
    float* out = c;
    long bytes = pitch * 4;
    if (rows < 32) {  // tiles are stored whole: in memory of their own
        out = edge;
        bytes = 128;
        for (long row = 0; adds && row < rows; row++) std::memcpy(edge + row * 32, c + row * pitch, 128);
    }
    float* lower = out + 4 * bytes;  // 16 rows on
    settle(a);
    settle(out);
    if (adds) {
        _tile_loadd(0, out, bytes);
        _tile_loadd(1, out + 16, bytes);
        _tile_loadd(2, lower, bytes);
        _tile_loadd(3, lower + 16, bytes);
    } else if (bias) {
        _tile_loadd(0, bias, 0);
        _tile_loadd(1, bias + 16, 0);
        _tile_loadd(2, bias, 0);
        _tile_loadd(3, bias + 16, 0);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (long step = 0; step < steps; step++, a += STEP, b += STEP) {
        _tile_loadd(4, a, 64);             // high, upper 16 rows
        _tile_loadd(5, a + 2 * TILE, 64);  // high, lower 16 rows
        _tile_loadd(6, b, 64);             // high, left 16 columns
        _tile_loadd(7, b + 2 * TILE, 64);  // high, right 16 columns
        add_products();
        _tile_loadd(6, b + TILE, 64);  // low
        _tile_loadd(7, b + 3 * TILE, 64);
        add_products();
        _tile_loadd(4, a + TILE, 64);  // low
        _tile_loadd(5, a + 3 * TILE, 64);
        _tile_loadd(6, b, 64);
        _tile_loadd(7, b + 2 * TILE, 64);
        add_products();
    }
    _tile_stored(0, out, bytes);
    _tile_stored(1, out + 16, bytes);
    _tile_stored(2, lower, bytes);
    _tile_stored(3, lower + 16, bytes);
    settle(out);
    for (long row = 0; rows < 32 && row < rows; row++) std::memcpy(c + row * pitch, edge + row * 32, 128);
}

}  // namespace

extern "C" {

// Ask the kernel for the registers of AMX; 0 where it grants them. Once a process, before the first product.
int request_tiles() { return static_cast<int>(syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_TILES)); }

// filters (N, K) => packed (N / 32, K / 32, STEP), the two numbers that follow one another in K side by side
void pack_filters(const float* filters, uint16_t* packed, long outputs, long depth) {
    alignas(64) uint16_t parts[2][32];
    for (long n = 0; n < outputs; n++)
        for (long k = 0; k < depth; k += 32) {
            split(filters + n * depth + k, parts[0], parts[1]);
            uint16_t* tiles = packed + (n / 32 * (depth / 32) + k / 32) * STEP + n % 32 / 16 * 2 * TILE;
            for (long part = 0; part < 2; part++)
                for (long i = 0; i < 32; i++) tiles[part * TILE + i / 2 * 32 + n % 16 * 2 + i % 2] = parts[part][i];
        }
}

// y (M, N) = what filters, packed, make of x, + bias (N) where it is not null. On the calling thread.
void multiply_filters(const float* x, const uint16_t* filters, const float* bias, float* y, const Geometry* geometry) {
    const Geometry g = *geometry;
    const long pixels = g.images * g.out_height * g.out_width, depth = g.taps * g.channels;
    alignas(64) thread_local uint16_t block[BLOCK_K / 32 * STEP];
    const Tiles tiles;
    for (long first_n = 0; first_n < g.outputs; first_n += BLOCK_N)
        for (long first_k = 0; first_k < depth; first_k += BLOCK_K) {
            const long end_k = std::min(first_k + BLOCK_K, depth), end_n = std::min(first_n + BLOCK_N, g.outputs);
            Pixel pixel;
            for (long m = 0; m < pixels; m += 32) {
                const long rows = std::min(32L, pixels - m);
                gather(x, g, pixel, rows, first_k, end_k, block);
                for (long n = first_n; n < end_n; n += 32) {
                    const uint16_t* panel = filters + (n / 32 * depth + first_k) / 32 * STEP;
                    const float* start = first_k == 0 && bias ? bias + n : nullptr;
                    float* out = y + m * g.outputs + n;
                    multiply(block, panel, (end_k - first_k) / 32, first_k > 0, start, out, g.outputs, rows);
                }
            }
        }
}

}  // extern "C"
