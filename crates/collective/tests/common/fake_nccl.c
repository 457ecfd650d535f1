/* NCCL and the CUDA driver for machines without a card: device memory is memory, a stream is a thread with a queue,
 * ranks are members of one process. Both libraries in one file. What goes wrong is chosen when it is compiled:
 *   FAKE_VERSION=21300   which NCCL it is            FAKE_LACKS_INIT      without ncclCommInitRankConfig
 *   FAKE_INIT_HANGS      no rank ever finds another  FAKE_INIT_FAILS=5    the result of starting
 *   FAKE_CALL_FAILS=4    the result of an all-reduce FAKE_BREAKS_AFTER=n  an asynchronous error after n all-reduces
 *   FAKE_WORK_HANGS      all-reduces end only when they are aborted      FAKE_ID_FAILS=2   no unique id
 */
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#ifndef FAKE_VERSION
#define FAKE_VERSION 22809
#endif
enum { SUCCESS = 0, INVALID_ARGUMENT = 4, REMOTE_ERROR = 6, IN_PROGRESS = 7, NOT_READY = 600 };
enum { UINT8 = 1, UINT64 = 5, FLOAT32 = 7 };
#define MOST_RANKS 16

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t moved = PTHREAD_COND_INITIALIZER;

/* ---- streams ---- */
typedef struct Task {
  struct Task *next;
  void (*run)(struct Task *);
  void *a, *b;
  size_t bytes;
  int operation, type, root;
  struct Comm *comm;
  uint64_t ticket;
} Task;
typedef struct Stream {
  Task *first, *last;
  int closing, busy;
  pthread_t thread;
} Stream;
typedef struct Event {
  uint64_t asked, passed;
} Event;

static void *work_off(void *argument) {
  Stream *stream = argument;
  pthread_mutex_lock(&lock);
  for (;;) {
    while (!stream->first && !stream->closing) pthread_cond_wait(&moved, &lock);
    Task *task = stream->first;
    if (!task) break;
    stream->first = task->next;
    if (!stream->first) stream->last = NULL;
    pthread_mutex_unlock(&lock);
    task->run(task);
    free(task);
    pthread_mutex_lock(&lock);
    pthread_cond_broadcast(&moved);
  }
  pthread_mutex_unlock(&lock);
  free(stream);
  return NULL;
}
static Stream default_stream;
static void put(Stream *stream, Task task) {
  if (!stream) stream = &default_stream;
  if (stream == &default_stream) { /* nothing of the test's own work is ever under way */
    task.run(&task);
    return;
  }
  Task *copy = malloc(sizeof *copy);
  *copy = task;
  copy->next = NULL;
  pthread_mutex_lock(&lock);
  if (stream->last) stream->last->next = copy; else stream->first = copy;
  stream->last = copy;
  pthread_cond_broadcast(&moved);
  pthread_mutex_unlock(&lock);
}
static void do_copy(Task *task) { memcpy(task->a, task->b, task->bytes); }
static void do_pass(Task *task) {
  Event *event = task->a;
  pthread_mutex_lock(&lock);
  if (task->ticket > event->passed) event->passed = task->ticket;
  pthread_cond_broadcast(&moved);
  pthread_mutex_unlock(&lock);
}
static void do_hold(Task *task) {
  Event *event = task->a;
  pthread_mutex_lock(&lock);
  while (event->passed < task->ticket) pthread_cond_wait(&moved, &lock);
  pthread_mutex_unlock(&lock);
}

/* ---- the driver ---- */
int cuInit(unsigned flags) { return flags ? 1 : 0; }
int cuDeviceGet(int *device, int index) { return *device = index, index < 0 || index >= MOST_RANKS ? 101 : 0; }
int cuDeviceGetUuid(unsigned char *uuid, int device) { return memset(uuid, device + 1, 16), 0; }
int cuDevicePrimaryCtxRetain(void **context, int device) { return *context = (void *)(intptr_t)(device + 1), 0; }
int cuDevicePrimaryCtxRelease_v2(int device) { return (void)device, 0; }
int cuCtxSetCurrent(void *context) { return context ? 0 : 201; }
int cuStreamCreateWithPriority(void **stream, unsigned flags, int priority) {
  (void)flags, (void)priority;
  Stream *made = calloc(1, sizeof *made);
  *stream = made;
  return pthread_create(&made->thread, NULL, work_off, made);
}
int cuStreamDestroy_v2(void *stream) {
  Stream *this = stream;
  pthread_mutex_lock(&lock);
  this->closing = 1;
  pthread_detach(this->thread);
  pthread_cond_broadcast(&moved);
  pthread_mutex_unlock(&lock);
  return 0;
}
int cuEventCreate(void **event, unsigned flags) { return (void)flags, *event = calloc(1, sizeof(Event)), 0; }
int cuEventDestroy_v2(void *event) { return (void)event, 0; } /* a stream may still need it */
int cuEventRecord(void *event, void *stream) {
  pthread_mutex_lock(&lock);
  uint64_t ticket = ++((Event *)event)->asked;
  pthread_mutex_unlock(&lock);
  put(stream, (Task){.run = do_pass, .a = event, .ticket = ticket});
  return 0;
}
int cuEventQuery(void *event) {
  pthread_mutex_lock(&lock);
  int over = ((Event *)event)->passed == ((Event *)event)->asked;
  pthread_mutex_unlock(&lock);
  return over ? 0 : NOT_READY;
}
int cuStreamWaitEvent(void *stream, void *event, unsigned flags) {
  (void)flags;
  put(stream, (Task){.run = do_hold, .a = event, .ticket = ((Event *)event)->asked});
  return 0;
}
int cuMemAlloc_v2(uint64_t *address, size_t bytes) { return *address = (uint64_t)malloc(bytes), *address ? 0 : 2; }
int cuMemFree_v2(uint64_t address) { return (void)address, 0; } /* the real one waits for the streams */
int cuMemHostAlloc(void **start, size_t bytes, unsigned flags) { return (void)flags, *start = malloc(bytes), *start ? 0 : 2; }
int cuMemFreeHost(void *start) { return (void)start, 0; }
int cuMemcpyHtoDAsync_v2(uint64_t to, const void *from, size_t bytes, void *stream) {
  put(stream, (Task){.run = do_copy, .a = (void *)to, .b = (void *)from, .bytes = bytes});
  return 0;
}
int cuMemcpyDtoHAsync_v2(void *to, uint64_t from, size_t bytes, void *stream) {
  put(stream, (Task){.run = do_copy, .a = to, .b = (void *)from, .bytes = bytes});
  return 0;
}

/* ---- NCCL ---- */
typedef struct Group {
  struct Group *next;
  uint64_t id;
  int ranks, joined, dead;
  /* One operation at a time: what each rank laid down, and how many have taken. */
  Task *laid[MOST_RANKS];
  int count, taken;
  uint64_t round;
} Group;
typedef struct Comm {
  Group *group;
  int rank, aborted, broken, reduced;
} Comm;
typedef struct {
  char bytes[128];
} Id;
typedef struct { /* as far as every version has it */
  size_t size;
  unsigned magic, version;
  int blocking;
} Config;

static Group *groups;
static uint64_t ids;

int ncclGetVersion(int *version) { return *version = FAKE_VERSION, SUCCESS; }
const char *ncclGetErrorString(int result) {
  return result == 5 ? "invalid usage" : result == REMOTE_ERROR ? "remote process exited" : "some error";
}
const char *ncclGetLastError(void *comm) { return (void)comm, "the fake's last word"; }
int ncclGetUniqueId(Id *id) {
#ifdef FAKE_ID_FAILS
  return (void)id, FAKE_ID_FAILS;
#else
  memset(id, 0, sizeof *id);
  pthread_mutex_lock(&lock);
  uint64_t number = ++ids;
  pthread_mutex_unlock(&lock);
  return memcpy(id, &number, sizeof number), SUCCESS;
#endif
}

static size_t config_bytes(void) {
  return FAKE_VERSION >= 22800 ? 80 : FAKE_VERSION >= 22700 ? 72 : FAKE_VERSION >= 21800 ? 48 : FAKE_VERSION >= 21700 ? 40 : 24;
}

#ifndef FAKE_LACKS_INIT
int ncclCommInitRankConfig(void **result, int ranks, Id id, int rank, Config *config) {
  *result = NULL;
  if (config->size != config_bytes() || config->magic != 0xcafebeef || config->blocking) return INVALID_ARGUMENT;
  if (config->version > FAKE_VERSION || ranks > MOST_RANKS) return INVALID_ARGUMENT;
#ifdef FAKE_INIT_FAILS
  return FAKE_INIT_FAILS;
#endif
  uint64_t number;
  memcpy(&number, &id, sizeof number);
  pthread_mutex_lock(&lock);
  Group *group = groups;
  while (group && group->id != number) group = group->next;
  if (!group) {
    group = calloc(1, sizeof *group);
    group->id = number, group->ranks = ranks, group->next = groups;
    groups = group;
  }
  group->joined++;
  Comm *comm = calloc(1, sizeof *comm);
  comm->group = group, comm->rank = rank;
  pthread_mutex_unlock(&lock);
  return *result = comm, IN_PROGRESS;
}
#endif

int ncclCommGetAsyncError(Comm *comm, int *state) {
  pthread_mutex_lock(&lock);
  *state = comm->group->joined < comm->group->ranks ? IN_PROGRESS : comm->broken ? REMOTE_ERROR : SUCCESS;
#ifdef FAKE_INIT_HANGS
  *state = IN_PROGRESS;
#endif
  pthread_mutex_unlock(&lock);
  return SUCCESS;
}
int ncclCommFinalize(Comm *comm) { return (void)comm, SUCCESS; }
int ncclCommDestroy(Comm *comm) { return (void)comm, SUCCESS; }
int ncclCommAbort(Comm *comm) {
  pthread_mutex_lock(&lock);
  comm->aborted = 1;
  pthread_cond_broadcast(&moved);
  pthread_mutex_unlock(&lock);
  return SUCCESS;
}

static size_t size_of(int type) { return type == UINT8 ? 1 : type == UINT64 ? 8 : 4; }

/* What this rank gets of what all laid down. Ranks that disagree get what fits, as from the real one. */
static void compute(Task *task, Task **laid, int ranks, void *into) {
  size_t bytes = task->bytes;
  for (int rank = 0; rank < ranks; rank++) {
    size_t least = laid[rank]->bytes < bytes ? laid[rank]->bytes : bytes;
    if (task->operation == 1) memcpy((char *)into + rank * bytes, laid[rank]->b, least);
    if (task->operation == 2 && rank == task->root) memcpy(into, laid[rank]->b, least);
    if (task->operation != 0) continue;
    for (size_t i = 0; i < least / size_of(task->type); i++) {
      if (task->type == FLOAT32) {
        float more = ((float *)laid[rank]->b)[i];
        ((float *)into)[i] = rank ? ((float *)into)[i] + more : more;
      } else {
        uint64_t more = ((uint64_t *)laid[rank]->b)[i];
        ((uint64_t *)into)[i] = rank ? ((uint64_t *)into)[i] + more : more;
      }
    }
  }
}
static void do_work(Task *task) {
  Comm *comm = task->comm;
  Group *group = comm->group;
  size_t room = task->operation == 1 ? task->bytes * group->ranks : task->bytes;
  void *into = malloc(room + 1);
  pthread_mutex_lock(&lock);
#ifdef FAKE_WORK_HANGS
  while (task->operation == 0 && !comm->aborted) pthread_cond_wait(&moved, &lock);
#endif
  while (group->laid[comm->rank] && !comm->aborted) pthread_cond_wait(&moved, &lock);
  if (!comm->aborted) {
    uint64_t round = group->round;
    group->laid[comm->rank] = task;
    group->count++;
    pthread_cond_broadcast(&moved);
    while ((group->count < group->ranks || group->dead) && !comm->aborted) pthread_cond_wait(&moved, &lock);
    if (!comm->aborted) {
      compute(task, group->laid, group->ranks, into);
      group->taken++;
      pthread_cond_broadcast(&moved);
      /* Nobody writes before all have read: buffers may be both. */
      while ((group->taken < group->ranks || group->dead) && group->round == round && !comm->aborted) pthread_cond_wait(&moved, &lock);
      if (!comm->aborted && group->round == round) {
        group->round++, group->count = 0, group->taken = 0;
        memset(group->laid, 0, sizeof group->laid);
        pthread_cond_broadcast(&moved);
      }
      if (!comm->aborted) memcpy(task->a, into, room);
    }
    /* What it laid down is gone: nobody's operation ends any more. */
    if (comm->aborted) group->dead = 1, pthread_cond_broadcast(&moved);
  }
  pthread_mutex_unlock(&lock);
  free(into);
}
static int queue(Comm *comm, void *stream, Task task) {
  task.run = do_work, task.comm = comm;
  put(stream, task);
  return SUCCESS;
}
int ncclAllReduce(const void *from, void *to, size_t count, int type, int operation, Comm *comm, void *stream) {
#ifdef FAKE_CALL_FAILS
  return FAKE_CALL_FAILS;
#endif
#ifdef FAKE_BREAKS_AFTER
  if (++comm->reduced > FAKE_BREAKS_AFTER) {
    comm->broken = 1;
    return IN_PROGRESS;
  }
#endif
  (void)operation;
  return queue(comm, stream, (Task){.a = to, .b = (void *)from, .bytes = count * size_of(type), .operation = 0, .type = type});
}
int ncclAllGather(const void *from, void *to, size_t count, int type, Comm *comm, void *stream) {
  return queue(comm, stream, (Task){.a = to, .b = (void *)from, .bytes = count * size_of(type), .operation = 1, .type = type});
}
int ncclBroadcast(const void *from, void *to, size_t count, int type, int root, Comm *comm, void *stream) {
  return queue(comm, stream, (Task){.a = to, .b = (void *)from, .bytes = count * size_of(type), .operation = 2, .type = type, .root = root});
}
