/* Attention of float32 heads on a CPU, for `open_gem.kernels.attention`: the same numbers as scaled_dot_product_attention in fewer
   operations and without a pause between them.

   self_self  softmax(p pT / tau) of unit vectors p is made of E = exp((p pT - 1) / tau). No row needs its maximum, since
              that is its diagonal, 0. E is symmetric: the tiles above the diagonal are computed and used twice. Between
              iterations p is normalised, so that the rows' sums do not matter. Several projections share one product
              with the values: (sum over p of E_p / its rows' sums) v.
   query_key  the host's own attention, a strip of rows at a time.

   One thread takes one head of one image at a time. Memory is linear in the number of tokens. Tokens are padded to whole
   tiles and widths to whole vectors, with zeros. */

#include <float.h>
#include <math.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX512F__)
enum { LANES = 16, SCORE_ROWS = 8, SCORE_VECTORS = 3, ROWS = 6, VECTORS = 4 };
#elif defined(__AVX2__) || defined(__ARM_NEON)
enum { LANES = 8, SCORE_ROWS = 4, SCORE_VECTORS = 3, ROWS = 6, VECTORS = 2 };
#else
#error "no vector unit that pays"
#endif
enum { TILE = 48, TILE_VECTORS = TILE / LANES, AREA = TILE * TILE, MOST = 3, SCRATCH = 1 << 24 /* numbers, 64 MiB */ };
_Static_assert(TILE % SCORE_ROWS == 0 && TILE % ROWS == 0 && TILE % LANES == 0, "tiles are whole blocks of registers");

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int ivec __attribute__((vector_size(4 * LANES), aligned(4)));

#define EACH(i, end) _Pragma("GCC unroll 16") for (int i = 0; i < (end); i++)
#define AT(p) (*(vec *)(p))

static inline vec splat(float x) { return x - (vec){0}; }
static inline long least(long a, long b) { return a < b ? a : b; }
static inline long whole(long n, long of) { return (n + of - 1) / of * of; }

static inline float total(vec x) {
    float sum = 0;
    for (int lane = 0; lane < LANES; lane++) sum += x[lane];
    return sum;
}

static inline vec larger(vec a, vec b) {
    ivec first = a > b;
    return (vec)(((ivec)a & first) | ((ivec)b & ~first));
}

/* 2^x for x in [-126, 127], within two units in the last place: 2^k for the whole number k next to x, and a polynomial
   for what is left, at most a half (of least relative error, found by Lawson's iteration) */
static inline vec power(vec x) {
    const vec magic = splat(12582912.f); /* 1.5 * 2^23: adding it rounds to a whole number, which is in the low bits */
    vec k = x + magic;
    vec f = x - (k - magic);
    vec y = splat(1.3264727313e-3f);
    y = y * f + 9.6715129912e-3f;
    y = y * f + 5.5507335812e-2f;
    y = y * f + 2.4022242427e-1f;
    y = y * f + 6.9314700365e-1f;
    y = y * f + 1.f;
    return (vec)((ivec)y + ((ivec)k << 23));
}

static vec identity(vec x) { return x; }

/* Blocks of registers ----------------------------------------------------------------------------------------------- */

/* acc[rows][count] += a b, with a's element (i, k) at a[i * row + k * step] and b's row k at b + k * width */
#define MULTIPLY(rows, count)                                        \
    for (long k = 0; k < depth; k++) {                               \
        vec right[count];                                            \
        EACH(j, count) right[j] = AT(b + k * width + j * LANES);     \
        EACH(i, rows) {                                              \
            vec left = splat(a[i * row + k * step]);                 \
            EACH(j, count) acc[i][j] += left * right[j];             \
        }                                                            \
    }

#define ADD_PRODUCT(name, count)                                                                          \
    static void name(float *out, const float *a, const long row, const long step, const float *b,         \
                     const long width, long depth) {                                                      \
        vec acc[ROWS][count];                                                                             \
        EACH(i, ROWS) EACH(j, count) acc[i][j] = AT(out + i * width + j * LANES);                         \
        MULTIPLY(ROWS, count)                                                                             \
        EACH(i, ROWS) EACH(j, count) AT(out + i * width + j * LANES) = acc[i][j];                         \
    }
ADD_PRODUCT(add_product, VECTORS)
ADD_PRODUCT(add_product_narrow, 1)

#define SCORE(name, count, function)                                                                      \
    static void name(float *tile, const float *a, const long row, const float *b, const long width,       \
                     float start) {                                                                       \
        const long step = 1, depth = row;                                                                 \
        vec acc[SCORE_ROWS][count];                                                                       \
        EACH(i, SCORE_ROWS) EACH(j, count) acc[i][j] = splat(start);                                      \
        MULTIPLY(SCORE_ROWS, count)                                                                       \
        EACH(i, SCORE_ROWS) EACH(j, count) AT(tile + i * TILE + j * LANES) = function(acc[i][j]);         \
    }
SCORE(score, SCORE_VECTORS, identity)
SCORE(score_narrow, 1, identity)
SCORE(score_power, SCORE_VECTORS, power)
SCORE(score_power_narrow, 1, power)

/* Tiles ------------------------------------------------------------------------------------------------------------- */

/* Some tokens of one head, as rows, and as columns (transposed); `padded` tokens of `width` numbers. */
typedef struct {
    float *rows, *columns;
} tokens;

typedef struct {
    long count, padded, width; /* tokens, the same in whole tiles, and the width of a head in whole vectors */
} shape;

/* out (rows, width) += a (rows, depth) b (depth, width) */
static inline void add(float *out, const float *a, const long row, const long step, const float *b, long width,
                       long rows, long depth) {
    for (long i = 0; i < rows; i += ROWS) {
        long j = 0;
        for (; j + VECTORS * LANES <= width; j += VECTORS * LANES)
            add_product(out + i * width + j, a + i * row, row, step, b + j, width, depth);
        for (; j < width; j += LANES)
            add_product_narrow(out + i * width + j, a + i * row, row, step, b + j, width, depth);
    }
}

static void add_tile(float *out, const float *tile, const float *b, long width, long rows, long depth) {
    add(out, tile, TILE, 1, b, width, rows, depth);
}

static void add_transposed(float *out, const float *tile, const float *b, long width, long rows, long depth) {
    add(out, tile, 1, TILE, b, width, rows, depth);
}

/* tile = start + a b, or 2 to the power of that, on `rows` x `columns`; `beyond` the last token */
static inline void fill(float *tile, const float *a, const float *b, shape s, float start, int powers,
                        float beyond, long rows, long columns) {
    long vectors = whole(columns, LANES) / LANES;
    for (long i = 0; i < rows; i += SCORE_ROWS) {
        long j = 0;
        for (; j + SCORE_VECTORS <= vectors; j += SCORE_VECTORS)
            (powers ? score_power : score)(tile + i * TILE + j * LANES, a + i * s.width, s.width, b + j * LANES,
                                               s.padded, start);
        for (; j < vectors; j++)
            (powers ? score_power_narrow : score_narrow)(tile + i * TILE + j * LANES, a + i * s.width, s.width,
                                                             b + j * LANES, s.padded, start);
    }
    for (long i = 0; i < TILE; i++)
        for (long j = i < rows ? columns : 0; j < TILE; j++) tile[i * TILE + j] = beyond;
}

/* sums of rows are kept as vectors, LANES parts of each, until `invert` adds them up */
static void add_row_sums(float *parts, const float *tile, long rows) {
    for (long i = 0; i < rows; i++) EACH(j, TILE_VECTORS) AT(parts + i * LANES) += AT(tile + i * TILE + j * LANES);
}

static void add_column_sums(float *sums, const float *tile, long rows) {
    for (long i = 0; i < rows; i++) EACH(j, TILE_VECTORS) AT(sums + j * LANES) += AT(tile + i * TILE + j * LANES);
}

static void invert(float *sums, const float *parts, long count) {
    for (long i = 0; i < count; i++) sums[i] = 1 / (sums[i] + total(AT(parts + i * LANES)));
}

/* blend = sum of `many` tiles, `apart` from each other, their rows (or columns) times weights, `padded` apart */
static void blend_rows(float *blend, const float *tiles, long apart, const float *weights, long padded, int many,
                       long rows) {
    for (long i = 0; i < rows; i++)
        EACH(j, TILE_VECTORS) {
            vec sum = splat(0);
            for (int m = 0; m < many; m++)
                sum += AT(tiles + m * apart + i * TILE + j * LANES) * weights[m * padded + i];
            AT(blend + i * TILE + j * LANES) = sum;
        }
}

static void blend_columns(float *blend, const float *tiles, long apart, const float *weights, long padded, int many,
                          long rows) {
    for (long i = 0; i < rows; i++)
        EACH(j, TILE_VECTORS) {
            vec sum = splat(0);
            for (int m = 0; m < many; m++)
                sum += AT(tiles + m * apart + i * TILE + j * LANES) * AT(weights + m * padded + j * LANES);
            AT(blend + i * TILE + j * LANES) = sum;
        }
}

/* One head ---------------------------------------------------------------------------------------------------------- */

/* Room of one thread. `e`: tiles; `sums` of their rows, and `parts` of such. */
typedef struct {
    tokens p[MOST];
    float *v, *o, *e, *sums, *parts, *tile;
} room;

static void copy_rows(float *to, const float *from, long stride, long width, shape s) {
    memset(to, 0, s.padded * s.width * sizeof(float));
    for (long i = 0; i < s.count; i++) memcpy(to + i * s.width, from + i * stride, width * sizeof(float));
}

/* unit rows; those shorter than `least` are divided by that, as torch's normalize has it */
static void normalise(float *rows, shape s, float least) {
    for (long i = 0; i < s.count; i++) {
        vec squares = splat(0);
        for (long k = 0; k < s.width; k += LANES) squares += AT(rows + i * s.width + k) * AT(rows + i * s.width + k);
        float norm = sqrtf(total(squares)), scale = norm > least || norm != norm ? 1 / norm : least > 0 ? 1 / least : 0;
        for (long k = 0; k < s.width; k += LANES) AT(rows + i * s.width + k) *= scale;
    }
}

static void transpose(float *columns, const float *rows, shape s, float scale) {
    for (long i = 0; i < s.padded; i += LANES)
        for (long k = 0; k < s.width; k++)
            for (long lane = 0; lane < LANES; lane++)
                columns[k * s.padded + i + lane] = rows[(i + lane) * s.width + k] * scale;
}

/* o = E p: softmax(p pT / tau) p but for the length of its rows */
static void iterate(float *o, tokens p, shape s, float inverse, float *tile) {
    memset(o, 0, s.padded * s.width * sizeof(float));
    for (long i = 0; i < s.count; i += TILE)
        for (long j = i; j < s.count; j += TILE) {
            long rows = least(TILE, s.count - i), columns = least(TILE, s.count - j);
            fill(tile, p.rows + i * s.width, p.columns + j, s, -inverse, 1, 0, rows, columns);
            add_tile(o + i * s.width, tile, p.rows + j * s.width, s.width, rows, columns);
            if (j > i) add_transposed(o + j * s.width, tile, p.rows + i * s.width, s.width, columns, rows);
        }
}

/* o = (sum over p of softmax(p pT / tau)) v, with the tiles above the diagonal of all p at once: n^2 numbers */
static void assign_triangle(room *r, shape s, float inverse, int many) {
    long side = s.padded / TILE, apart = side * (side + 1) / 2 * AREA;
    memset(r->sums, 0, MOST * s.padded * sizeof(float));
    for (int m = 0; m < many; m++) {
        float *tile = r->e + m * apart, *sums = r->sums + m * s.padded;
        memset(r->parts, 0, s.padded * LANES * sizeof(float));
        for (long i = 0; i < s.count; i += TILE)
            for (long j = i; j < s.count; j += TILE, tile += AREA) {
                long rows = least(TILE, s.count - i), columns = least(TILE, s.count - j);
                fill(tile, r->p[m].rows + i * s.width, r->p[m].columns + j, s, -inverse, 1, 0, rows, columns);
                add_row_sums(r->parts + i * LANES, tile, rows);
                if (j > i) add_column_sums(sums + j, tile, rows);
            }
        invert(sums, r->parts, s.count);
    }
    memset(r->o, 0, s.padded * s.width * sizeof(float));
    float *tile = r->e;
    for (long i = 0; i < s.count; i += TILE)
        for (long j = i; j < s.count; j += TILE, tile += AREA) {
            long rows = least(TILE, s.count - i), columns = least(TILE, s.count - j);
            blend_rows(r->tile, tile, apart, r->sums + i, s.padded, many, rows);
            add_tile(r->o + i * s.width, r->tile, r->v + j * s.width, s.width, rows, columns);
            if (j == i) continue;
            blend_columns(r->tile, tile, apart, r->sums + j, s.padded, many, rows);
            add_transposed(r->o + j * s.width, r->tile, r->v + i * s.width, s.width, columns, rows);
        }
}

/* The same a strip of rows at a time: every tile is computed, and memory is linear in the number of tokens. */
static void assign_strips(room *r, shape s, float inverse, int many) {
    long apart = s.padded / TILE * AREA;
    memset(r->o, 0, s.padded * s.width * sizeof(float));
    for (long i = 0; i < s.count; i += TILE) {
        long rows = least(TILE, s.count - i);
        memset(r->sums, 0, MOST * s.padded * sizeof(float));
        for (int m = 0; m < many; m++) {
            memset(r->parts, 0, TILE * LANES * sizeof(float));
            for (long j = 0; j < s.count; j += TILE) {
                float *tile = r->e + m * apart + j * TILE;
                fill(tile, r->p[m].rows + i * s.width, r->p[m].columns + j, s, -inverse, 1, 0, rows,
                     least(TILE, s.count - j));
                add_row_sums(r->parts, tile, rows);
            }
            invert(r->sums + m * s.padded, r->parts, rows);
        }
        for (long j = 0; j < s.count; j += TILE) {
            blend_rows(r->tile, r->e + j * TILE, apart, r->sums, s.padded, many, rows);
            add_tile(r->o + i * s.width, r->tile, r->v + j * s.width, s.width, rows, least(TILE, s.count - j));
        }
    }
}

/* o = softmax(q kT) v, with the scale, over ln 2, already in k; p[0] has q as rows, p[1] k as columns */
static void attend_strips(room *r, shape s) {
    memset(r->o, 0, s.padded * s.width * sizeof(float));
    for (long i = 0; i < s.count; i += TILE) {
        long rows = least(TILE, s.count - i);
        for (long j = 0; j < s.count; j += TILE)
            fill(r->e + j * TILE, r->p[0].rows + i * s.width, r->p[1].columns + j, s, 0, 0, -FLT_MAX, rows,
                 least(TILE, s.count - j));
        memset(r->sums, 0, TILE * sizeof(float));
        for (long row = 0; row < rows; row++) {
            vec most = splat(-FLT_MAX);
            for (long j = 0; j < s.padded; j += TILE)
                EACH(x, TILE_VECTORS) most = larger(AT(r->e + j * TILE + row * TILE + x * LANES), most);
            float top = most[0];
            for (int lane = 1; lane < LANES; lane++) top = most[lane] > top ? most[lane] : top;
            vec sum = splat(0), strange = splat(0); /* what is infinite or no number makes that of the row */
            for (long j = 0; j < s.padded; j += TILE)
                EACH(x, TILE_VECTORS) {
                    float *at = r->e + j * TILE + row * TILE + x * LANES;
                    vec y = power(larger(AT(at) - top, splat(-126)));
                    sum += y;
                    strange += AT(at) * 0.f;
                    AT(at) = y;
                }
            r->sums[row] = 1 / total(sum) + total(strange);
        }
        for (long j = 0; j < s.count; j += TILE)
            add_tile(r->o + i * s.width, r->e + j * TILE, r->v + j * s.width, s.width, rows, least(TILE, s.count - j));
        for (long row = 0; row < rows; row++)
            for (long k = 0; k < s.width; k++) r->o[(i + row) * s.width + k] *= r->sums[row];
    }
}

/* All heads of a batch ---------------------------------------------------------------------------------------------- */

/* Heads (images, heads, tokens, width) by their strides in numbers; along the width they are 1. */
typedef struct {
    float *data;
    long image, head, token;
} view;

typedef struct {
    view p[MOST], v, out;
    const float *inverse; /* 1 / tau of each image, at most 40; or the scale of q kT */
    long images, heads, tokens, width;
    long projections, iterations; /* iterations -1: query_key, with p = q, k */
    long threads;
    atomic_long next;
} job;

static float *at(view x, long image, long head) { return x.data + image * x.image + head * x.head; }

static int takes_triangle(long padded, long projections) { return padded * padded / 2 * projections <= SCRATCH; }

static void do_head(const job *t, room *r, shape s, long image, long head) {
    float inverse = t->inverse[image] * 1.44269504f; /* / ln 2: powers of 2 are cheaper than those of e */
    for (int m = 0; m < t->projections; m++) {
        tokens p = r->p[m];
        copy_rows(p.rows, at(t->p[m], image, head), t->p[m].token, t->width, s);
        if (t->iterations >= 0) normalise(p.rows, s, 1e-12f);
        for (long i = 0; i < t->iterations; i++) {
            transpose(p.columns, p.rows, s, inverse);
            iterate(r->o, p, s, inverse, r->tile);
            memcpy(p.rows, r->o, s.padded * s.width * sizeof(float));
            normalise(p.rows, s, 0);
        }
        transpose(p.columns, p.rows, s, inverse);
    }
    copy_rows(r->v, at(t->v, image, head), t->v.token, t->width, s);
    if (t->iterations < 0)
        attend_strips(r, s);
    else if (takes_triangle(s.padded, t->projections))
        assign_triangle(r, s, inverse, (int)t->projections);
    else
        assign_strips(r, s, inverse, (int)t->projections);
    float scale = t->iterations < 0 ? 1 : 1.f / t->projections;
    for (long i = 0; i < s.count; i++)
        for (long k = 0; k < t->width; k++)
            at(t->out, image, head)[i * t->out.token + k] = r->o[i * s.width + k] * scale;
}

static void do_heads(void *data) {
    job *t = data;
    shape s = {t->tokens, whole(t->tokens, TILE), whole(t->width, LANES)};
    long side = s.padded / TILE, area = s.padded * s.width;
    int triangular = t->iterations >= 0 && takes_triangle(s.padded, t->projections);
    long tiles = (triangular ? side * (side + 1) / 2 : side) * t->projections;
    long all = (2 * t->projections + 2) * area + (MOST + LANES) * s.padded + (1 + tiles) * AREA;
    float *block = aligned_alloc(64, whole(all * sizeof(float), 64)), *next = block;
    if (block == NULL) return; /* the other threads do all */
    room r;
    for (int m = 0; m < t->projections; m++, next += 2 * area) r.p[m] = (tokens){next, next + area};
    r.v = next, r.o = next + area, next += 2 * area;
    r.e = next, r.tile = next + tiles * AREA, next += (1 + tiles) * AREA;
    r.parts = next, r.sums = next + LANES * s.padded;
    for (long item; (item = atomic_fetch_add(&t->next, 1)) < t->images * t->heads;)
        do_head(t, &r, s, item / t->heads, item % t->heads);
    free(block);
}

/* The OpenMP runtime that torch has loaded: its own threads do the work, and none of another pool waits beside them. */
extern void GOMP_parallel(void (*work)(void *), void *data, unsigned threads, unsigned flags);

/* Nothing has to be asked of the system. */
int prepare(void) { return 0; }

/* 0, or 1 where no thread got memory, and nothing was done */
int attend(job *t) {
    t->next = 0;
    GOMP_parallel(do_heads, t, (unsigned)t->threads, 0);
    return atomic_load(&t->next) == 0;
}

/* Multiplications and additions in the matrix products of `attend`, for one head. A product of all pairs of tokens is
   2 n^2 c; a symmetric one half of that. */
double operations(long count, long width, long projections, long iterations) {
    double product = 2.0 * count * count * width;
    if (iterations < 0) return 2 * product;
    double scores = takes_triangle(whole(count, TILE), projections) ? 0.5 : 1;
    return product * (projections * (1.5 * iterations + scores) + 1);
}
