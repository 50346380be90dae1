/* The threads that run a library's parallel loops, in place of TVM's own.
 *
 * A loop is cut into several parts a thread, and each thread takes the next part when it is done
 * with one: a core that another process slows down takes fewer. A thread that has nothing to do
 * spins for some tens of microseconds, longer than the time between two kernels of a model, and
 * then sleeps. TVM's threads either spin by yielding, which costs milliseconds beside a busy
 * process, or are woken for each kernel, which takes some 50 us; here a launch takes 1 to 2
 * (docs/notes.md).
 *
 * Plain C and a few functions of the system's library, declared here: what links the kernels of
 * another machine compiles this too, and need not have that machine's headers.
 */
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>

/* As in tvm/runtime/c_backend_api.h. */
typedef struct {
  void* sync_handle;
  int32_t num_task;
} Group;
typedef int (*Task)(int part, Group* group, void* data);

int getpid(void);
/* pthread_t is an unsigned long or a pointer. */
int pthread_create(uintptr_t* thread, const void* attributes, void* (*start)(void*), void* data);
int pthread_join(uintptr_t thread, void** result);

#if defined(__APPLE__)
int __ulock_wait(uint32_t operation, void* word, uint64_t value, uint32_t microseconds);
int __ulock_wake(uint32_t operation, void* word, uint64_t value);
enum { COMPARE_AND_WAIT = 1, WAKE_ALL = 0x100 };
static void sleep_while(_Atomic uint32_t* word, uint32_t value) {
  __ulock_wait(COMPARE_AND_WAIT, word, value, 0);
}
static void wake(_Atomic uint32_t* word) { __ulock_wake(COMPARE_AND_WAIT | WAKE_ALL, word, 0); }
#else
long syscall(long number, ...);
#if defined(__x86_64__)
enum { FUTEX = 202 };
#else
enum { FUTEX = 98 };
#endif
enum { PRIVATE_WAIT = 128, PRIVATE_WAKE = 129 };
static void sleep_while(_Atomic uint32_t* word, uint32_t value) {
  syscall(FUTEX, word, (long)PRIVATE_WAIT, (long)value, NULL);
}
static void wake(_Atomic uint32_t* word) {
  syscall(FUTEX, word, (long)PRIVATE_WAKE, (long)INT32_MAX);
}
#endif

#if defined(__x86_64__)
static void relax(void) { __builtin_ia32_pause(); }
#elif defined(__aarch64__)
static void relax(void) { __asm__ volatile("isb"); }
#else
static void relax(void) {}
#endif

enum { MOST_THREADS = 1024, PARTS_A_THREAD = 4, SPINS = 2000, LINE = 128 };

static struct {
  /* Written by all threads. */
  _Alignas(LINE) _Atomic uint64_t left; /* launch << 32 | parts that nobody has taken */
  _Alignas(LINE) _Atomic uint32_t undone; /* parts that are not done */
  _Atomic uint32_t caller_sleeps;
  /* Rung by the caller: it changes with every launch. */
  _Alignas(LINE) _Atomic uint32_t bell;
  _Atomic uint32_t sleepers;
  /* Of a launch: they stay as they are until all its parts are done. */
  _Alignas(LINE) Task task;
  void* data;
  Group group;
  _Atomic int32_t failed; /* a part that failed; -1: none */
  /* Of the pool. */
  atomic_flag busy; /* held by a launch, and by who changes what follows */
  _Atomic int32_t threads; /* the caller's among them */
  int32_t workers;  /* that run */
  int process;      /* whose they are: the child of a fork has none */
  _Atomic int ending;
  uintptr_t handles[MOST_THREADS];
} pool = {.threads = 1, .busy = ATOMIC_FLAG_INIT};

/* Takes parts while there are any. */
static void work(void) {
  uint32_t done = 0;
  uint64_t left = atomic_load(&pool.left);
  while ((uint32_t)left != 0) {
    /* A worker that comes late finds another launch's number here, and takes nothing of it. */
    if (!atomic_compare_exchange_weak(&pool.left, &left, left - 1)) continue;
    /* Now the launch cannot end before this part has. */
    int32_t part = pool.group.num_task - (int32_t)(uint32_t)left;
    if (pool.task(part, &pool.group, pool.data) != 0) atomic_store(&pool.failed, part);
    done++;
    left = atomic_load(&pool.left);
  }
  if (done == 0) return;
  if (atomic_fetch_sub(&pool.undone, done) == done && atomic_load(&pool.caller_sleeps)) {
    wake(&pool.undone);
  }
}

/* Returns when the word is no longer `value`, at the latest after SPINS times. */
static void spin_while(_Atomic uint32_t* word, uint32_t value) {
  for (int i = 0; i < SPINS && atomic_load(word) == value; i++) relax();
}

static void* run_worker(void* first) {
  uint32_t heard = (uint32_t)(uintptr_t)first;
  while (!atomic_load(&pool.ending)) {
    work();
    spin_while(&pool.bell, heard);
    if (atomic_load(&pool.bell) == heard) {
      atomic_fetch_add(&pool.sleepers, 1);
      while (atomic_load(&pool.bell) == heard) sleep_while(&pool.bell, heard);
      atomic_fetch_sub(&pool.sleepers, 1);
    }
    heard = atomic_load(&pool.bell);
  }
  return NULL;
}

static void ring(void) {
  atomic_fetch_add(&pool.bell, 1);
  if (atomic_load(&pool.sleepers) != 0) wake(&pool.bell);
}

static void forget_the_parents_workers(void) {
  int process = getpid();
  if (process == pool.process) return;
  pool.process = process;
  pool.workers = 0;
  atomic_store(&pool.sleepers, 0);
}

/* As many as there can be: a loop is done by those that run. */
static void start_workers(void) {
  forget_the_parents_workers();
  void* heard = (void*)(uintptr_t)atomic_load(&pool.bell);
  while (pool.workers < atomic_load(&pool.threads) - 1) {
    if (pthread_create(&pool.handles[pool.workers], NULL, run_worker, heard) != 0) break;
    pool.workers++;
  }
}

static void end_workers(void) {
  forget_the_parents_workers();
  atomic_store(&pool.ending, 1);
  ring();
  while (pool.workers > 0) pthread_join(pool.handles[--pool.workers], NULL);
  atomic_store(&pool.ending, 0);
}

/* Runs task(part, group, data) for every part; what TVMBackendParallelLaunch does. parts: 0, as many
 * as suit the pool. The loops of a second caller, meanwhile, run in its own thread.
 */
int phi3c_parallel_launch(Task task, void* data, int parts) {
  int32_t threads = atomic_load(&pool.threads);
  if (parts == 0) parts = threads == 1 ? 1 : threads * PARTS_A_THREAD;
  Group group = {NULL, parts};
  if (parts == 1 || threads == 1 || atomic_flag_test_and_set(&pool.busy)) {
    for (int part = 0; part < parts; part++) {
      if (task(part, &group, data) != 0) return -1;
    }
    return 0;
  }
  start_workers();
  pool.task = task;
  pool.data = data;
  pool.group = group;
  atomic_store(&pool.failed, -1);
  atomic_store(&pool.undone, (uint32_t)parts);
  uint64_t launch = (atomic_load(&pool.left) >> 32) + 1;
  atomic_store(&pool.left, launch << 32 | (uint32_t)parts);
  ring();
  work();
  uint32_t undone = atomic_load(&pool.undone);
  for (int i = 0; i < SPINS && undone != 0; i++, undone = atomic_load(&pool.undone)) relax();
  if (undone != 0) {
    atomic_store(&pool.caller_sleeps, 1);
    while ((undone = atomic_load(&pool.undone)) != 0) sleep_while(&pool.undone, undone);
    atomic_store(&pool.caller_sleeps, 0);
  }
  int32_t failed = atomic_load(&pool.failed);
  atomic_flag_clear(&pool.busy);
  /* An error is known only to the thread where it was raised: the part fails again in this one. */
  return failed < 0 ? 0 : task(failed, &group, data);
}

/* From the next launch on, so many threads, the caller's among them. */
void phi3c_set_threads(int threads) {
  if (threads == atomic_load(&pool.threads)) return;
  while (atomic_flag_test_and_set(&pool.busy)) relax();
  end_workers();
  atomic_store(&pool.threads, threads < 1 ? 1 : threads > MOST_THREADS ? MOST_THREADS : threads);
  atomic_flag_clear(&pool.busy);
}

/* Until the next launch nothing runs in the library. */
void phi3c_end_workers(void) {
  while (atomic_flag_test_and_set(&pool.busy)) relax();
  end_workers();
  atomic_flag_clear(&pool.busy);
}
