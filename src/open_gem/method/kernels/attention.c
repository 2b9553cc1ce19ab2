/* Attention of float32 heads on a CPU, for `open_gem.method.kernels.attention`: the same numbers as
   scaled_dot_product_attention in fewer operations and without a pause between them.

   self_self  softmax(p pT / tau) of unit vectors p is made of E = exp((p pT - 1) / tau). No row needs its maximum, since
              that is its diagonal, 0. E is symmetric: the tiles above the diagonal are computed and used twice. Between
              iterations p is normalised, so that the rows' sums do not matter. Several projections share one product
              with the values: (sum over p of E_p / its rows' sums) v.
   query_key  the host's own attention, a strip of rows at a time.

   One thread takes one head of one image at a time. Where that would leave threads idle, all share all heads, a strip of
   rows at a time: the same numbers to the last bit, in more operations, with the vectors of all heads in memory. Memory is
   linear in the number of tokens. Tokens are padded to whole tiles and widths to whole vectors, with zeros. */

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

/* The vectors of one head: p before and after an iteration (after: only where threads share it), and the values. */
typedef struct {
    tokens p[MOST][2];
    float *v;
} store;

/* What one thread needs: `o`, the result; `e`, tiles; `sums` of their rows, and `parts` of such. */
typedef struct {
    float *o, *e, *sums, *parts, *tile;
} desk;

/* a strip of tokens, and zeros after the last */
static void copy_strip(float *to, const float *from, long stride, long width, shape s, long first) {
    long rows = least(TILE, s.count - first);
    memset(to + first * s.width, 0, TILE * s.width * sizeof(float));
    for (long i = first; i < first + rows; i++) memcpy(to + i * s.width, from + i * stride, width * sizeof(float));
}

/* unit rows of a strip; those shorter than `low` are divided by that, as torch's normalize has it */
static void normalise(float *rows, shape s, float low, long first) {
    for (long i = first; i < least(first + TILE, s.count); i++) {
        vec squares = splat(0);
        for (long k = 0; k < s.width; k += LANES) squares += AT(rows + i * s.width + k) * AT(rows + i * s.width + k);
        float norm = sqrtf(total(squares)), scale = norm > low || norm != norm ? 1 / norm : low > 0 ? 1 / low : 0;
        for (long k = 0; k < s.width; k += LANES) AT(rows + i * s.width + k) *= scale;
    }
}

static void transpose(tokens p, shape s, float scale, long first) {
    for (long i = first; i < first + TILE; i += LANES)
        for (long k = 0; k < s.width; k++)
            for (long lane = 0; lane < LANES; lane++)
                p.columns[k * s.padded + i + lane] = p.rows[(i + lane) * s.width + k] * scale;
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

/* The same for a strip of rows, `o`, in the same order: tiles below the diagonal are those above it, computed again. */
static void iterate_strip(float *o, tokens p, shape s, float inverse, float *tile, long i) {
    long rows = least(TILE, s.count - i);
    memset(o, 0, TILE * s.width * sizeof(float));
    for (long j = 0; j < s.count; j += TILE) {
        long columns = least(TILE, s.count - j);
        if (j < i) {
            fill(tile, p.rows + j * s.width, p.columns + i, s, -inverse, 1, 0, columns, rows);
            add_transposed(o, tile, p.rows + j * s.width, s.width, rows, columns);
        } else {
            fill(tile, p.rows + i * s.width, p.columns + j, s, -inverse, 1, 0, rows, columns);
            add_tile(o, tile, p.rows + j * s.width, s.width, rows, columns);
        }
    }
}

/* o = (sum over p of softmax(p pT / tau)) v, with the tiles above the diagonal of all p at once: n^2 numbers */
static void assign_triangle(const desk *d, const store *h, int turn, shape s, float inverse, int many) {
    long side = s.padded / TILE, apart = side * (side + 1) / 2 * AREA;
    memset(d->sums, 0, MOST * s.padded * sizeof(float));
    for (int m = 0; m < many; m++) {
        float *tile = d->e + m * apart, *sums = d->sums + m * s.padded;
        memset(d->parts, 0, s.padded * LANES * sizeof(float));
        for (long i = 0; i < s.count; i += TILE)
            for (long j = i; j < s.count; j += TILE, tile += AREA) {
                long rows = least(TILE, s.count - i), columns = least(TILE, s.count - j);
                fill(tile, h->p[m][turn].rows + i * s.width, h->p[m][turn].columns + j, s, -inverse, 1, 0, rows, columns);
                add_row_sums(d->parts + i * LANES, tile, rows);
                if (j > i) add_column_sums(sums + j, tile, rows);
            }
        invert(sums, d->parts, s.count);
    }
    memset(d->o, 0, s.padded * s.width * sizeof(float));
    float *tile = d->e;
    for (long i = 0; i < s.count; i += TILE)
        for (long j = i; j < s.count; j += TILE, tile += AREA) {
            long rows = least(TILE, s.count - i), columns = least(TILE, s.count - j);
            blend_rows(d->tile, tile, apart, d->sums + i, s.padded, many, rows);
            add_tile(d->o + i * s.width, d->tile, h->v + j * s.width, s.width, rows, columns);
            if (j == i) continue;
            blend_columns(d->tile, tile, apart, d->sums + j, s.padded, many, rows);
            add_transposed(d->o + j * s.width, d->tile, h->v + i * s.width, s.width, columns, rows);
        }
}

/* The same for a strip of rows, `o`: every tile is computed, and memory is linear in the number of tokens. If `mirrored`,
   in the same order, with tiles below the diagonal as in iterate_strip. */
static void assign_strip(float *o, const desk *d, const store *h, int turn, shape s, float inverse, int many, long i,
                         int mirrored) {
    long apart = s.padded / TILE * AREA, rows = least(TILE, s.count - i);
    for (int m = 0; m < many; m++) {
        tokens p = h->p[m][turn];
        float *sums = d->sums + m * s.padded;
        memset(sums, 0, TILE * sizeof(float));
        memset(d->parts, 0, TILE * LANES * sizeof(float));
        for (long j = 0; j < s.count; j += TILE) {
            float *tile = d->e + m * apart + j * TILE;
            long columns = least(TILE, s.count - j);
            if (mirrored && j < i) {
                fill(tile, p.rows + j * s.width, p.columns + i, s, -inverse, 1, 0, columns, rows);
                add_column_sums(sums, tile, columns);
            } else {
                fill(tile, p.rows + i * s.width, p.columns + j, s, -inverse, 1, 0, rows, columns);
                add_row_sums(d->parts, tile, rows);
            }
        }
        invert(sums, d->parts, rows);
    }
    memset(o, 0, TILE * s.width * sizeof(float));
    for (long j = 0; j < s.count; j += TILE) {
        const float *tiles = d->e + j * TILE, *v = h->v + j * s.width;
        long columns = least(TILE, s.count - j);
        if (mirrored && j < i) {
            blend_columns(d->tile, tiles, apart, d->sums, s.padded, many, columns);
            add_transposed(o, d->tile, v, s.width, rows, columns);
        } else {
            blend_rows(d->tile, tiles, apart, d->sums, s.padded, many, rows);
            add_tile(o, d->tile, v, s.width, rows, columns);
        }
    }
}

/* o = softmax(q kT) v for a strip of rows, with the scale, over ln 2, already in k; p[0] has q as rows, p[1] k as
   columns */
static void attend_strip(float *o, const desk *d, const store *h, shape s, long i) {
    long rows = least(TILE, s.count - i);
    memset(o, 0, TILE * s.width * sizeof(float));
    for (long j = 0; j < s.count; j += TILE)
        fill(d->e + j * TILE, h->p[0][0].rows + i * s.width, h->p[1][0].columns + j, s, 0, 0, -FLT_MAX, rows,
             least(TILE, s.count - j));
    for (long row = 0; row < rows; row++) {
        vec most = splat(-FLT_MAX);
        for (long j = 0; j < s.padded; j += TILE)
            EACH(x, TILE_VECTORS) most = larger(AT(d->e + j * TILE + row * TILE + x * LANES), most);
        float top = most[0];
        for (int lane = 1; lane < LANES; lane++) top = most[lane] > top ? most[lane] : top;
        vec sum = splat(0), strange = splat(0); /* what is infinite or no number makes that of the row */
        for (long j = 0; j < s.padded; j += TILE)
            EACH(x, TILE_VECTORS) {
                float *at = d->e + j * TILE + row * TILE + x * LANES;
                vec y = power(larger(AT(at) - top, splat(-126)));
                sum += y;
                strange += AT(at) * 0.f;
                AT(at) = y;
            }
        d->sums[row] = 1 / total(sum) + total(strange);
    }
    for (long j = 0; j < s.count; j += TILE)
        add_tile(o, d->e + j * TILE, h->v + j * s.width, s.width, rows, least(TILE, s.count - j));
    for (long row = 0; row < rows; row++)
        for (long k = 0; k < s.width; k++) o[row * s.width + k] *= d->sums[row];
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
    float *memory; /* of threads that share heads */
} job;

static float *at(view x, long image, long head) { return x.data + image * x.image + head * x.head; }

static int takes_triangle(long padded, long projections) { return padded * padded / 2 * projections <= SCRATCH; }

/* 1 / tau over ln 2: powers of 2 are cheaper than those of e */
static float inverse_of(const job *t, long image) { return t->inverse[image] * 1.44269504f; }

/* a strip of projection `which`, or of the values after the last */
static void read_strip(const job *t, const store *h, shape s, long image, long head, long which, long first) {
    int is_value = which == t->projections;
    view from = is_value ? t->v : t->p[which];
    float *rows = is_value ? h->v : h->p[which][0].rows;
    copy_strip(rows, at(from, image, head), from.token, t->width, s, first);
    if (is_value) return;
    if (t->iterations >= 0) normalise(rows, s, 1e-12f, first);
    transpose(h->p[which][0], s, inverse_of(t, image), first);
}

/* a strip of the result: `o`, of what is after the iterations, p[turn] */
static void assign(const job *t, float *o, const desk *d, const store *h, int turn, shape s, long image, long first) {
    if (t->iterations < 0)
        attend_strip(o, d, h, s, first);
    else
        assign_strip(o, d, h, turn, s, inverse_of(t, image), (int)t->projections, first,
                     takes_triangle(s.padded, t->projections));
}

static void write_strip(const job *t, const float *o, shape s, long image, long head, long first) {
    float scale = t->iterations < 0 ? 1 : 1.f / t->projections, *out = at(t->out, image, head);
    for (long i = 0; i < least(TILE, s.count - first); i++)
        for (long k = 0; k < t->width; k++) out[(first + i) * t->out.token + k] = o[i * s.width + k] * scale;
}

/* One head by one thread: symmetric products once. */
static void do_head(const job *t, const desk *d, const store *h, shape s, long image, long head) {
    float inverse = inverse_of(t, image);
    for (long which = 0; which <= t->projections; which++) {
        for (long i = 0; i < s.padded; i += TILE) read_strip(t, h, s, image, head, which, i);
        for (long turn = 0; which < t->projections && turn < t->iterations; turn++) {
            tokens p = h->p[which][0];
            iterate(d->o, p, s, inverse, d->tile);
            memcpy(p.rows, d->o, s.padded * s.width * sizeof(float));
            for (long i = 0; i < s.padded; i += TILE) normalise(p.rows, s, 0, i), transpose(p, s, inverse, i);
        }
    }
    if (t->iterations >= 0 && takes_triangle(s.padded, t->projections))
        assign_triangle(d, h, 0, s, inverse, (int)t->projections);
    else
        for (long i = 0; i < s.padded; i += TILE) assign(t, d->o + i * s.width, d, h, 0, s, image, i);
    for (long i = 0; i < s.padded; i += TILE) write_strip(t, d->o + i * s.width, s, image, head, i);
}

static shape shape_of(const job *t) {
    return (shape){t->tokens, whole(t->tokens, TILE), whole(t->width, LANES)};
}

/* Where a head a thread would take half as long again as if all threads worked to the end, which is about what symmetry
   saves; without symmetry, a tenth. */
static int are_shared(long heads, long threads, long iterations) {
    return 10 * whole(heads, threads) > (iterations < 0 ? 11 : 15) * heads;
}
static int shares_heads(const job *t) { return are_shared(t->images * t->heads, t->threads, t->iterations); }

static long copies(const job *t) { return shares_heads(t) && t->iterations > 0 ? 2 : 1; }
static long store_size(const job *t, shape s) { return (2 * copies(t) * t->projections + 1) * s.padded * s.width; }

static float *take(float **memory, long count) {
    float *taken = *memory;
    *memory += count;
    return taken;
}

static store take_store(const job *t, shape s, float *memory) {
    const long area = s.padded * s.width;
    store h = {0};
    for (long which = 0; which < t->projections; which++)
        for (long turn = 0; turn < copies(t); turn++)
            h.p[which][turn].rows = take(&memory, area), h.p[which][turn].columns = take(&memory, area);
    h.v = take(&memory, area);
    return h;
}

static long tiles(const job *t, shape s) {
    long side = s.padded / TILE, all = !shares_heads(t) && t->iterations >= 0 && takes_triangle(s.padded, t->projections);
    return (all ? side * (side + 1) / 2 : side) * t->projections;
}

static long output_size(const job *t, shape s) { return (shares_heads(t) ? TILE : s.padded) * s.width; }
static long desk_size(const job *t, shape s) {
    return output_size(t, s) + (MOST + LANES) * s.padded + (1 + tiles(t, s)) * AREA;
}

static desk take_desk(const job *t, shape s, float *memory) {
    desk d;
    d.o = take(&memory, output_size(t, s));
    d.e = take(&memory, tiles(t, s) * AREA);
    d.tile = take(&memory, AREA);
    d.parts = take(&memory, LANES * s.padded);
    d.sums = memory;
    return d;
}

static float *allocate(long count) { return aligned_alloc(64, whole(count * sizeof(float), 64)); }

static void do_heads(void *data) {
    job *t = data;
    const shape s = shape_of(t);
    float *memory = allocate(store_size(t, s) + desk_size(t, s));
    if (memory == NULL) return; /* the other threads do all */
    const store h = take_store(t, s, memory);
    const desk d = take_desk(t, s, memory + store_size(t, s));
    for (long item; (item = atomic_fetch_add(&t->next, 1)) < t->images * t->heads;)
        do_head(t, &d, &h, s, item / t->heads, item % t->heads);
    free(memory);
}

extern void GOMP_barrier(void);

extern int omp_get_thread_num(void);

/* All heads by all threads: a strip of any of them at a time, once all of the step before are done. */
static void share_heads(void *data) {
    job *t = data;
    const shape s = shape_of(t);
    const long heads = t->images * t->heads, side = s.padded / TILE, last = 1 + (t->iterations > 0 ? t->iterations : 0);
    const desk d = take_desk(t, s, t->memory + heads * store_size(t, s) + omp_get_thread_num() * desk_size(t, s));
    long item = atomic_fetch_add(&t->next, 1), end = 0;
    for (long step = 0; step <= last; step++) {
        const long parts = step == 0 ? t->projections + 1 : step < last ? t->projections : 1, start = end;
        for (end += heads * parts * side; item < end; item = atomic_fetch_add(&t->next, 1)) {
            const long i = (item - start) % side * TILE, which = (item - start) / side % parts;
            const long index = (item - start) / side / parts, image = index / t->heads, head = index % t->heads;
            const store h = take_store(t, s, t->memory + index * store_size(t, s));
            if (step == 0) {
                read_strip(t, &h, s, image, head, which, i);
            } else if (step < last) {
                tokens p = h.p[which][(step - 1) % 2], next = h.p[which][step % 2];
                iterate_strip(next.rows + i * s.width, p, s, inverse_of(t, image), d.tile, i);
                normalise(next.rows, s, 0, i);
                transpose(next, s, inverse_of(t, image), i);
            } else {
                assign(t, d.o, &d, &h, (last - 1) % 2, s, image, i);
                write_strip(t, d.o, s, image, head, i);
            }
        }
        GOMP_barrier();
    }
}

/* The OpenMP runtime that torch has loaded: its own threads do the work, and none of another pool waits beside them. */
extern void GOMP_parallel(void (*work)(void *), void *data, unsigned threads, unsigned flags);

/* Nothing has to be asked of the system. */
int prepare(void) { return 0; }

/* 0, or 1 where there was no memory, and nothing was done */
int attend(job *t) {
    const shape s = shape_of(t);
    const int shared = shares_heads(t);
    const long size = t->images * t->heads * store_size(t, s) + t->threads * desk_size(t, s);
    if (shared && (t->memory = allocate(size)) == NULL) return 1;
    t->next = 0;
    GOMP_parallel(shared ? share_heads : do_heads, t, (unsigned)t->threads, 0);
    if (shared) free(t->memory);
    return atomic_load(&t->next) == 0;
}

/* Multiplications and additions in the matrix products of `attend`. A product of all pairs of tokens is 2 n^2 c; a
   symmetric one half of that, where it is computed once. */
double operations(long heads, long threads, long count, long width, long projections, long iterations) {
    double product = 2.0 * heads * count * count * width;
    if (iterations < 0) return 2 * product;
    int shared = are_shared(heads, threads, iterations);
    double scores = !shared && takes_triangle(whole(count, TILE), projections) ? 0.5 : 1;
    return product * (projections * ((shared ? 2 : 1.5) * iterations + scores) + 1);
}
