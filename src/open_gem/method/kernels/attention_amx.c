/* Attention of bfloat16 heads on a CPU with AMX, whose tiles multiply 16 x 32 by 32 x 16 numbers at once. Sums, norms and
   exponentials are float32. For `open_gem.method.kernels.attention`.

   Both attentions are made of one step: o = E b, with E = 2^(scale a aT + start) of a strip of 32 rows.

   self_self  a = b = unit vectors p between iterations, then b = v: start = -1 / tau makes each row's largest entry 1.
              Between iterations o is normalised, so that the rows' sums do not matter.
   query_key  the rows' largest scores are found first, then computed once more: such a product costs less than memory.

   Memory is linear in the number of tokens. Each thread takes one head at a time; where that would leave threads idle all
   share each. Tokens and widths are padded to whole blocks of 32, with zeros. */

#include <immintrin.h>
#include <math.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#if !defined(__AMX_BF16__) || !defined(__AVX512BF16__) || !defined(__linux__)
#error "this processor has no AMX"
#endif

enum { BLOCK = 32, LANES = 16, MOST = 3 };
typedef uint16_t number; /* the upper half of a float */
typedef uint32_t couple; /* two numbers that meet in one product */

#define EACH(i, end) _Pragma("GCC unroll 16") for (long i = 0; i < (end); i++)

static inline long least(long a, long b) { return a < b ? a : b; }
static inline long whole(long n, long of) { return (n + of - 1) / of * of; }

/* 2^x with a relative error below 1e-4, where bfloat16 keeps 4e-3: a polynomial of what is above the whole number
   below x. Numbers that are too small become 0; what is no number stays that. */
static inline __m512 power(__m512 x) {
    __m512 f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
    __m512 y = _mm512_set1_ps(7.802452e-2f);
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(2.2606716e-1f));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(6.9583354e-1f));
    y = _mm512_fmadd_ps(y, f, _mm512_set1_ps(9.9992522e-1f));
    return _mm512_scalef_ps(y, x);
}

/* Products of blocks ------------------------------------------------------------------------------------------------ */

/* A factor in memory, in blocks of 32 x 32 numbers. Distances are in bytes: from one row (of couples, on the right) to
   the next, from one block to the next that is summed over, and, on the right, to the other 16 columns. */
typedef struct {
    const void *data;
    long row, step, columns;
} factor;

/* c (32, 32) = the sum over `steps` blocks of a b */
static inline void multiply(float *c, factor a, factor b, long steps) {
    const char *left = a.data, *right = b.data;
    const long row = BLOCK * sizeof(float);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (long step = 0; step < steps; step++, left += a.step, right += b.step) {
        _tile_loadd(4, left, a.row);
        _tile_loadd(6, right, b.row);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, right + b.columns, b.row);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, left + LANES * a.row, a.row);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c, row);
    _tile_stored(1, c + LANES, row);
    _tile_stored(2, c + LANES * BLOCK, row);
    _tile_stored(3, c + LANES * BLOCK + LANES, row);
}

/* Ask the system for the tiles' registers: 0 where it grants them to this process. */
int prepare(void) {
    enum { REQUEST = 0x1023, TILE_DATA = 18 };
    return (int)syscall(SYS_arch_prctl, REQUEST, TILE_DATA);
}

static void begin_tiles(void) {
    struct {
        uint8_t palette, start, reserved[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } shapes __attribute__((aligned(64))) = {.palette = 1};
    for (int tile = 0; tile < 8; tile++) shapes.bytes[tile] = 64, shapes.rows[tile] = LANES;
    _tile_loadconfig(&shapes);
}

/* One head ---------------------------------------------------------------------------------------------------------- */

/* Vectors of one head in the orders in which products read them: `rows` (token, k); `columns`, 16 tokens beside each
   other, (token / 16, k / 2, token % 16, k % 2); and `pairs` of tokens (token / 2, k, token % 2). */
typedef struct {
    number *rows;
    couple *columns, *pairs;
} vectors;

typedef struct {
    long count, padded, width, wide; /* tokens and the width of a head, as they are and in whole blocks */
} shape;

/* Heads (images, heads, tokens, width) by their strides in numbers; along the width they are 1. */
typedef struct {
    number *data;
    long image, head, token;
} view;

typedef struct {
    view p[MOST], v, out;
    const float *inverse; /* 1 / tau of each image, at most 40; or the scale of q kT */
    long images, heads, tokens, width;
    long projections, iterations; /* iterations -1: query_key, with p = q, k */
    long threads;
    atomic_long next;
    char *memory;
} job;

/* What one thread needs: some rows, weights of a strip, two blocks of scores, and sums of rows in 16 parts. */
typedef struct {
    float *x, *o, *c, *parts;
    number *e;
} desk;

static number *at(view x, long image, long head) { return x.data + image * x.image + head * x.head; }

static inline __m512 to_float(__m256i x) {
    return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16);
}

/* x (32, wide) = a strip of tokens */
static void read_strip(float *x, const number *from, long token, shape s, long first) {
    for (long i = 0; i < BLOCK; i++)
        for (long k = 0; k < s.wide; k += LANES) {
            long left = first + i < s.count ? s.width - k : 0;
            __mmask16 mask = left >= LANES ? 0xffff : left > 0 ? (1u << left) - 1 : 0;
            const number *here = from + (first + i) * token + k;
            _mm512_storeu_ps(x + i * s.wide + k, to_float(_mm256_maskz_loadu_epi16(mask, here)));
        }
}

static void write_strip(number *to, long token, const float *x, shape s, long first) {
    for (long i = 0; i < least(BLOCK, s.count - first); i++)
        for (long k = 0; k < s.width; k += LANES) {
            __mmask16 mask = s.width - k >= LANES ? 0xffff : (1u << (s.width - k)) - 1;
            __m256i y = (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(x + i * s.wide + k));
            _mm256_mask_storeu_epi16(to + (first + i) * token + k, mask, y);
        }
}

/* unit rows; those shorter than `low` are divided by that, as torch's normalize has it; padding is 0 */
static void normalise(float *x, shape s, long first, float low) {
    for (long i = 0; i < BLOCK; i++) {
        __m512 squares = _mm512_setzero_ps();
        for (long k = 0; k < s.wide; k += LANES) {
            __m512 y = _mm512_loadu_ps(x + i * s.wide + k);
            squares = _mm512_fmadd_ps(y, y, squares);
        }
        float norm = sqrtf(_mm512_reduce_add_ps(squares));
        float scale = norm > low || norm != norm ? 1 / norm : low > 0 ? 1 / low : 0;
        for (long k = 0; k < s.wide; k += LANES) {
            __m512 y = _mm512_mul_ps(_mm512_loadu_ps(x + i * s.wide + k), _mm512_set1_ps(scale));
            _mm512_storeu_ps(x + i * s.wide + k, first + i < s.count ? y : _mm512_setzero_ps());
        }
    }
}

/* put a strip of vectors into each order that is there */
static void order(vectors to, const float *x, shape s, long first) {
    if (to.rows != NULL)
        for (long i = 0; i < BLOCK; i++)
            for (long k = 0; k < s.wide; k += 2 * LANES) {
                __m512 low = _mm512_loadu_ps(x + i * s.wide + k), high = _mm512_loadu_ps(x + i * s.wide + k + LANES);
                _mm512_storeu_si512(to.rows + (first + i) * s.wide + k, (__m512i)_mm512_cvtne2ps_pbh(high, low));
            }
    if (to.columns != NULL) {
        __m512i apart = _mm512_mullo_epi32(
            _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0), _mm512_set1_epi32((int)s.wide));
        for (long i = 0; i < BLOCK; i += LANES)
            for (long k = 0; k < s.wide; k += 2) {
                __m512 low = _mm512_i32gather_ps(apart, x + i * s.wide + k, 4);
                __m512 high = _mm512_i32gather_ps(apart, x + i * s.wide + k + 1, 4);
                __m512i y = _mm512_inserti64x4(_mm512_castsi256_si512((__m256i)_mm512_cvtneps_pbh(low)),
                                               (__m256i)_mm512_cvtneps_pbh(high), 1);
                y = _mm512_or_si512(
                    _mm512_cvtepu16_epi32(_mm512_castsi512_si256(y)),
                    _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(y, 1)), 16));
                _mm512_storeu_si512(to.columns + ((first + i) * s.wide + k * LANES) / 2, y);
            }
    }
    if (to.pairs != NULL)
        for (long i = 0; i < BLOCK; i += 2)
            for (long k = 0; k < s.wide; k += LANES) {
                const float *here = x + i * s.wide + k;
                __m512i even = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(here)));
                __m512i odd = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(here + s.wide)));
                couple *there = to.pairs + (first + i) / 2 * s.wide + k;
                _mm512_storeu_si512(there, _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
            }
}

static void score(float *c, const number *rows, const couple *columns, shape s, long first, long j) {
    const long number_row = s.wide * sizeof(number), tokens = LANES * number_row;
    factor a = {rows + first * s.wide, number_row, 64, 0};
    factor b = {columns + j * s.wide / 2, 64, 16 * 64, tokens};
    multiply(c, a, b, s.wide / BLOCK);
}

static inline __mmask16 within(shape s, long j) {
    long left = s.count - j;
    return left >= LANES ? 0xffff : left > 0 ? (1u << left) - 1 : 0;
}

/* the largest score of each row of a strip */
static void find_largest(desk *d, float *largest, const number *rows, const couple *columns, shape s, long first) {
    for (long i = 0; i < BLOCK; i++) _mm512_storeu_ps(d->parts + i * LANES, _mm512_set1_ps(-INFINITY));
    for (long j = 0; j < s.padded; j += BLOCK) {
        score(d->c, rows, columns, s, first, j);
        for (long i = 0; i < BLOCK; i++) {
            __m512 most = _mm512_loadu_ps(d->parts + i * LANES);
            EACH(x, 2) {
                __m512 y = _mm512_loadu_ps(d->c + i * BLOCK + x * LANES);
                most = _mm512_mask_max_ps(most, within(s, j + x * LANES), y, most);
            }
            _mm512_storeu_ps(d->parts + i * LANES, most);
        }
    }
    for (long i = 0; i < BLOCK; i++) largest[i] = _mm512_reduce_max_ps(_mm512_loadu_ps(d->parts + i * LANES));
}

/* o (32, wide) = E b of a strip, with E = 2^(scale rows columns + start of each row); sums of E's rows */
static void attend_strip(desk *d, float *sums, const number *rows, const couple *columns, const couple *pairs, shape s,
                         float scale, const float *start, long first) {
    memset(d->parts, 0, BLOCK * LANES * sizeof(float));
    score(d->c, rows, columns, s, first, 0);
    for (long j = 0; j < s.padded; j += BLOCK) {
        const float *here = d->c + j % (2 * BLOCK) * BLOCK;
        if (j + BLOCK < s.padded) score(d->c + (j + BLOCK) % (2 * BLOCK) * BLOCK, rows, columns, s, first, j + BLOCK);
        __mmask16 masks[2] = {within(s, j), within(s, j + LANES)};
        for (long i = 0; i < BLOCK; i++) {
            __m512 y[2];
            EACH(x, 2) {
                __m512 c = _mm512_loadu_ps(here + i * BLOCK + x * LANES);
                y[x] = power(_mm512_fmadd_ps(c, _mm512_set1_ps(scale), _mm512_set1_ps(start[i])));
                y[x] = _mm512_maskz_mov_ps(masks[x], y[x]);
            }
            float *part = d->parts + i * LANES;
            _mm512_storeu_ps(part, _mm512_add_ps(_mm512_loadu_ps(part), _mm512_add_ps(y[0], y[1])));
            _mm512_storeu_si512(d->e + j * BLOCK + i * BLOCK, (__m512i)_mm512_cvtne2ps_pbh(y[1], y[0]));
        }
    }
    for (long i = 0; i < BLOCK; i++) sums[i] = _mm512_reduce_add_ps(_mm512_loadu_ps(d->parts + i * LANES));
    const long couple_row = s.wide * sizeof(couple);
    factor a = {d->e, 64, BLOCK * 64, 0};
    for (long k = 0; k < s.wide; k += BLOCK) {
        factor b = {pairs + k, couple_row, LANES * couple_row, 64};
        multiply(d->c, a, b, s.padded / BLOCK);
        for (long i = 0; i < BLOCK; i++)
            memcpy(d->o + i * s.wide + k, d->c + i * BLOCK, BLOCK * sizeof(float));
    }
}

/* Threads that share a head: this one is `rank` of `size`. */
typedef struct {
    long rank, size;
} team;

extern void GOMP_barrier(void);
static void meet(team t) {
    if (t.size > 1) GOMP_barrier();
}

/* Memory of a team: the vectors of each projection before and after an iteration, and the values. */
typedef struct {
    vectors p[MOST][2], v;
} store;

static void do_head(const job *t, team mates, desk *d, store *m, shape s, long image, long head) {
    const int asks = t->iterations < 0;
    const float scale = t->inverse[image] * 1.44269504f; /* / ln 2: powers of 2 are cheaper than those of e */
    const long side = s.padded / BLOCK;
    float start[BLOCK], sums[BLOCK];
    EACH(i, BLOCK) start[i] = -scale;

    for (long item = mates.rank; item < (t->projections + 1) * side; item += mates.size) {
        long which = item / side, first = item % side * BLOCK, is_value = which == t->projections;
        view from = is_value ? t->v : t->p[which];
        vectors to = is_value ? m->v : m->p[which][0];
        read_strip(d->x, at(from, image, head), from.token, s, first);
        if (!asks && !is_value) normalise(d->x, s, first, 1e-12f);
        order(to, d->x, s, first);
    }
    meet(mates);
    for (long turn = 0; turn < t->iterations; turn++) {
        for (long item = mates.rank; item < t->projections * side; item += mates.size) {
            long which = item / side, first = item % side * BLOCK;
            vectors p = m->p[which][turn % 2];
            attend_strip(d, sums, p.rows, p.columns, p.pairs, s, scale, start, first);
            normalise(d->o, s, first, 0);
            order(m->p[which][(turn + 1) % 2], d->o, s, first);
        }
        meet(mates);
    }
    for (long first = mates.rank * BLOCK; first < s.padded; first += mates.size * BLOCK) {
        memset(d->x, 0, BLOCK * s.wide * sizeof(float));
        for (long which = 0; which < (asks ? 1 : t->projections); which++) {
            vectors p = m->p[which][asks ? 0 : t->iterations % 2], other = asks ? m->p[1][0] : p;
            if (asks) {
                find_largest(d, start, p.rows, other.columns, s, first);
                EACH(i, BLOCK) start[i] *= -scale;
            }
            attend_strip(d, sums, p.rows, other.columns, m->v.pairs, s, scale, start, first);
            for (long i = 0; i < BLOCK; i++) {
                __m512 share = _mm512_set1_ps(1 / (sums[i] * (asks ? 1 : t->projections)));
                for (long k = 0; k < s.wide; k += LANES) {
                    float *x = d->x + i * s.wide + k;
                    _mm512_storeu_ps(x, _mm512_fmadd_ps(_mm512_loadu_ps(d->o + i * s.wide + k), share, _mm512_loadu_ps(x)));
                }
            }
        }
        write_strip(at(t->out, image, head), t->out.token, d->x, s, first);
    }
    meet(mates); /* nobody reads on while the next head comes */
}

/* All heads of a batch ---------------------------------------------------------------------------------------------- */

static shape shape_of(const job *t) {
    return (shape){t->tokens, whole(t->tokens, BLOCK), t->width, whole(t->width, BLOCK)};
}

static long area(shape s) { return s.padded * s.wide * sizeof(number); }
static long store_bytes(const job *t, shape s) { return (t->projections * 3 * (t->iterations > 0 ? 2 : 1) + 1) * area(s); }
static long desk_bytes(shape s) {
    return (2 * BLOCK * s.wide + 2 * BLOCK * BLOCK + BLOCK * LANES) * sizeof(float) + s.padded * BLOCK * sizeof(number);
}

static char *take(char **memory, long bytes) {
    char *taken = *memory;
    *memory += bytes;
    return taken;
}

extern int omp_get_thread_num(void), omp_get_num_threads(void);

/* Where a head a thread would take a tenth longer than if all threads worked to the end. */
static int shares_heads(const job *t) {
    long heads = t->images * t->heads;
    return 10 * whole(heads, t->threads) > 11 * heads;
}

static void do_heads(void *data) {
    job *t = data;
    shape s = shape_of(t);
    const int shared = shares_heads(t);
    const long rank = omp_get_thread_num();
    team mates = {shared ? rank : 0, shared ? omp_get_num_threads() : 1};

    char *memory = t->memory + (shared ? 0 : rank) * store_bytes(t, s);
    store m = {0};
    for (long which = 0; which < t->projections; which++)
        for (long turn = 0; turn < (t->iterations > 0 ? 2 : 1); turn++) {
            vectors *p = &m.p[which][turn];
            p->rows = (number *)take(&memory, area(s));
            p->columns = (couple *)take(&memory, area(s));
            p->pairs = (couple *)take(&memory, area(s));
        }
    m.v.pairs = (couple *)take(&memory, area(s));

    memory = t->memory + (shared ? 1 : t->threads) * store_bytes(t, s) + rank * desk_bytes(s);
    desk d;
    d.x = (float *)take(&memory, BLOCK * s.wide * sizeof(float));
    d.o = (float *)take(&memory, BLOCK * s.wide * sizeof(float));
    d.c = (float *)take(&memory, 2 * BLOCK * BLOCK * sizeof(float));
    d.parts = (float *)take(&memory, BLOCK * LANES * sizeof(float));
    d.e = (number *)memory;

    begin_tiles();
    if (shared)
        for (long item = 0; item < t->images * t->heads; item++)
            do_head(t, mates, &d, &m, s, item / t->heads, item % t->heads);
    else
        for (long item; (item = atomic_fetch_add(&t->next, 1)) < t->images * t->heads;)
            do_head(t, mates, &d, &m, s, item / t->heads, item % t->heads);
    _tile_release();
}

/* The OpenMP runtime that torch has loaded: its own threads do the work, and none of another pool waits beside them. */
extern void GOMP_parallel(void (*work)(void *), void *data, unsigned threads, unsigned flags);

/* 0, or 1 where there is no memory, and nothing was done */
int attend(job *t) {
    shape s = shape_of(t);
    long bytes = (shares_heads(t) ? 1 : t->threads) * store_bytes(t, s) + t->threads * desk_bytes(s);
    if ((t->memory = aligned_alloc(64, whole(bytes, 64))) == NULL) return 1;
    t->next = 0;
    GOMP_parallel(do_heads, t, (unsigned)t->threads, 0);
    free(t->memory);
    return 0;
}

/* Multiplications and additions in the matrix products of `attend`, without padding. A product of all pairs of tokens is
   2 n^2 c; the scores of query_key are computed twice and count once. */
double operations(long heads, long threads, long count, long width, long projections, long iterations) {
    (void)threads;
    double product = 2.0 * heads * count * count * width;
    return iterations < 0 ? 2 * product : 2 * product * projections * (iterations + 1);
}
