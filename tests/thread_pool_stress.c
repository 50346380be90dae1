/* Launches of many sizes, one after another and from two callers at once, whose parts add up. */
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

typedef struct {
  void* sync_handle;
  int32_t num_task;
} Group;
int phi3c_parallel_launch(int (*task)(int, Group*, void*), void* data, int parts);
void phi3c_set_threads(int threads);
void phi3c_end_workers(void);

enum { MOST = 64 };
typedef struct {
  int calls[MOST]; /* not atomic: two threads in one part would be a data race */
  int parts;
} Launch;

static int count(int part, Group* group, void* data) {
  Launch* launch = data;
  if (part >= MOST || group->num_task > MOST) return 1;
  if (part == 0) launch->parts = group->num_task;
  launch->calls[part]++;
  return 0;
}

static void* launch_many(void* argument) {
  unsigned seed = (unsigned)(uintptr_t)argument;
  for (int i = 0; i < 3000; i++) {
    Launch launch = {{0}, 0};
    int asked = rand_r(&seed) % 12;
    if (phi3c_parallel_launch(count, &launch, asked) != 0) return "a launch failed";
    if (asked != 0 && launch.parts != asked) return "another number of parts";
    for (int part = 0; part < MOST; part++) {
      if (launch.calls[part] != (part < launch.parts)) return "a part not done once";
    }
    if (rand_r(&seed) % 97 == 0) usleep(rand_r(&seed) % 300); /* the workers fall asleep */
    if (rand_r(&seed) % 199 == 0) phi3c_end_workers();
    if (rand_r(&seed) % 211 == 0) phi3c_set_threads(1 + rand_r(&seed) % 5);
  }
  return NULL;
}

int main(void) {
  for (int threads = 1; threads <= 5; threads++) {
    pthread_t second;
    void *mine, *other;
    phi3c_set_threads(threads);
    pthread_create(&second, NULL, launch_many, (void*)(uintptr_t)(100 + threads));
    mine = launch_many((void*)(uintptr_t)threads);
    pthread_join(second, &other);
    if (mine != NULL || other != NULL) {
      printf("%d threads: %s\n", threads, (char*)(mine != NULL ? mine : other));
      return 1;
    }
  }
  phi3c_end_workers();
  puts("every part was done once");
  return 0;
}
