/* Runs a kernel for `tools/sanitize.py` at odd shapes and strides, on threads that sanitizers can see through (OpenMP's
   they cannot). Each tensor has memory of its own, of just its size, and so has what the kernel takes for itself: from
   the sanitizer; and once more at the end of a page, before one that nothing can be read from, since sanitizers do not
   see vectors that are read or written in part. Compile with -DKERNEL="attention.c" and -DNUMBER=float, or their
   counterparts for bfloat16. */

#define _GNU_SOURCE
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>

static int guarded;
enum { PAGE = 4096 };

/* `size` bytes; if guarded, one page with the number of bytes of the mapping, those of the memory, and one page that
   cannot be read */
static void *take_memory(size_t size) {
    void *memory = NULL;
    if (!guarded) return posix_memalign(&memory, 64, size) ? NULL : memory;
    size_t whole = (size + PAGE - 1) / PAGE * PAGE, all = whole + 2 * PAGE;
    char *start = mmap(NULL, all, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (start == MAP_FAILED || mprotect(start + PAGE + whole, PAGE, PROT_NONE)) abort();
    *(size_t *)start = all;
    if (mprotect(start, PAGE, PROT_READ)) abort();
    return start + PAGE + whole - size;
}

static void give_memory(void *memory) {
    if (!guarded) {
        free(memory);
        return;
    }
    char *start = (char *)((uintptr_t)memory / PAGE * PAGE - PAGE);
    munmap(start, *(size_t *)start);
}

#define aligned_alloc(alignment, size) take_memory(size)
#define free give_memory
#include KERNEL

enum { MAX_THREADS = 8 };
static pthread_barrier_t barrier;
static _Thread_local int own_rank, own_size = 1;

typedef struct {
    void (*work)(void *);
    void *data;
    int rank, size;
} member;

static void *begin(void *data) {
    member *m = data;
    own_rank = m->rank, own_size = m->size;
    m->work(m->data);
    return NULL;
}

void GOMP_parallel(void (*work)(void *), void *data, unsigned threads, unsigned flags) {
    (void)flags;
    pthread_t others[MAX_THREADS];
    member members[MAX_THREADS];
    pthread_barrier_init(&barrier, NULL, threads);
    for (int i = 0; i < (int)threads; i++) {
        members[i] = (member){work, data, i, (int)threads};
        if (pthread_create(&others[i], NULL, begin, &members[i])) abort();
    }
    for (int i = 0; i < (int)threads; i++) pthread_join(others[i], NULL);
    pthread_barrier_destroy(&barrier);
}

void GOMP_barrier(void) { pthread_barrier_wait(&barrier); }
int omp_get_thread_num(void) { return own_rank; }
int omp_get_num_threads(void) { return own_size; }

static NUMBER number_of(float x) {
    if (sizeof(NUMBER) == sizeof(float)) return (NUMBER)x;
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return (NUMBER)(bits >> 16); /* the upper half is the number in bfloat16 */
}

static int is_finite(NUMBER x) {
    if (sizeof(NUMBER) == sizeof(float)) return isfinite((float)x);
    return ((uint32_t)x & 0x7f80) != 0x7f80;
}

/* A tensor (images, heads, tokens, width): contiguous, or as a packed projection leaves it, (images, tokens, heads,
   width), with `gap` numbers after the heads of each token but the last. */
static view tensor(const job *t, int packed, long gap, uint32_t *seed) {
    long token = packed ? t->heads * t->width + gap : t->width;
    long head = packed ? t->width : t->tokens * t->width;
    long image = packed ? t->tokens * token : t->heads * head;
    long size = t->images * image - (packed ? gap : 0);
    NUMBER *data = take_memory(size * sizeof(NUMBER));
    if (data == NULL) abort();
    for (long i = 0; i < size; i++) {
        *seed = *seed * 1664525u + 1013904223u;
        data[i] = number_of((float)(*seed >> 8) / (1 << 23) - 1);
    }
    return (view){(void *)data, image, head, token};
}

static void run_once(long images, long heads, long tokens, long width, long projections, long iterations, long threads) {
    static uint32_t seed = 1;
    float *inverse = take_memory(images * sizeof(float));
    for (long i = 0; i < images; i++) inverse[i] = iterations < 0 ? 0.125f : 1 + 39.f * i / images;
    for (int packed = 0; packed < 2; packed++) {
        job t = {.inverse = inverse, .images = images, .heads = heads, .tokens = tokens, .width = width,
                 .projections = projections, .iterations = iterations, .threads = threads};
        for (long m = 0; m < projections; m++) t.p[m] = tensor(&t, packed, 3, &seed);
        t.v = tensor(&t, packed, 5, &seed);
        t.out = tensor(&t, 1, 0, &seed);
        if (attend(&t)) abort();
        for (long i = 0; i < images * heads * tokens * width; i++)
            if (!is_finite(((NUMBER *)t.out.data)[i])) {
                fprintf(stderr, "not finite: %ld images, %ld heads, %ld tokens, width %ld, %ld projections, %ld iterations\n",
                        images, heads, tokens, width, projections, iterations);
                exit(1);
            }
        for (long m = 0; m < projections; m++) free(t.p[m].data);
        free(t.v.data);
        free(t.out.data);
    }
    free(inverse);
}

static void run(long images, long heads, long tokens, long width, long projections, long iterations, long threads) {
    for (guarded = 0; guarded < 2; guarded++) run_once(images, heads, tokens, width, projections, iterations, threads);
}

int main(void) {
    static const long sizes[] = {1, 2, 5, 31, 32, 33, 47, 48, 49, 97, 150};
    static const long widths[] = {1, 4, 16, 24, 64, 72, 80, 88};
    static const long threads[] = {1, 2, 3, 8};
    if (prepare()) return 77;
    int count = 0;
    for (int n = 0; n < (int)(sizeof sizes / sizeof *sizes); n++)
        for (int c = 0; c < (int)(sizeof widths / sizeof *widths); c++, count++) {
            long workers = threads[count % 4], images = 1 + count % 2, heads = 1 + count % 3;
            for (long iterations = 0; iterations < 3; iterations++)
                run(images, heads, sizes[n], widths[c], 1 + (count + iterations) % MOST, iterations, workers);
            run(images, heads, sizes[n], widths[c], 2, -1, workers);
        }
    run(2, 32, 33, 16, 3, 1, 2); /* many heads: each thread takes its own */
    for (long workers = 1; workers < 3; workers++) run(1, 1, 3400, 16, 3, 1, workers); /* many tokens: a strip of rows at a time */
    printf("%d shapes\n", count + 3);
    return 0;
}
