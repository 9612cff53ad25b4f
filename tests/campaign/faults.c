/* Faults at chosen file operations of a process, for LD_PRELOAD.

   LION_FAULT_FOLDER: only operations on paths that contain this text count.
   LION_FAULT_AT: number of the operation, counted from 1, at which the fault comes.
   LION_FAULT: "kill" for SIGKILL before the operation, or the number of an errno that it and all later ones fail with.
   LION_FAULT_COUNT: file that gets a byte for each operation. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

static long done;

static int fault(const char *path) {
  const char *folder = getenv("LION_FAULT_FOLDER"), *at = getenv("LION_FAULT_AT"), *what = getenv("LION_FAULT");
  const char *count = getenv("LION_FAULT_COUNT");
  if (!folder || !path || !strstr(path, folder)) return 0;
  done++;
  if (count) {
    int (*real_open)(const char *, int, ...) = dlsym(RTLD_NEXT, "open");
    ssize_t (*real_write)(int, const void *, size_t) = dlsym(RTLD_NEXT, "write");
    int file = real_open(count, O_WRONLY | O_CREAT | O_APPEND, 0666);
    if (file >= 0 && real_write(file, "x", 1) == 1) close(file);
  }
  if (!at || !what || done < atol(at)) return 0;
  if (!strcmp(what, "kill")) kill(getpid(), SIGKILL);
  errno = atoi(what);
  return 1;
}

static int fault_of(int file) {
  char link[64], path[4096];
  snprintf(link, sizeof link, "/proc/self/fd/%d", file);
  ssize_t size = readlink(link, path, sizeof path - 1);
  if (size < 0) return 0;
  path[size] = 0;
  return fault(path);
}

#define REAL(type, name, ...) type (*real)(__VA_ARGS__) = dlsym(RTLD_NEXT, #name)
#define OPEN(name)                                                 \
  int name(const char *path, int flags, ...) {                     \
    va_list rest;                                                  \
    va_start(rest, flags);                                         \
    mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0; \
    va_end(rest);                                                  \
    if ((flags & (O_WRONLY | O_RDWR | O_CREAT)) && fault(path)) return -1; \
    REAL(int, name, const char *, int, ...);                       \
    return real(path, flags, mode);                                \
  }
OPEN(open)
OPEN(open64)
#define ON_FILE(type, name, arguments, ...)  \
  type name arguments {                      \
    if (fault_of(file)) return -1;           \
    type(*real) arguments = dlsym(RTLD_NEXT, #name); \
    return real(__VA_ARGS__);                \
  }
ON_FILE(ssize_t, write, (int file, const void *from, size_t size), file, from, size)
ON_FILE(ssize_t, pwrite64, (int file, const void *from, size_t size, off64_t at), file, from, size, at)
ON_FILE(int, fsync, (int file), file)
ON_FILE(int, ftruncate64, (int file, off64_t size), file, size)
ON_FILE(int, ftruncate, (int file, off_t size), file, size)
#define ON_PATH(name, arguments, ...)       \
  int name arguments {                      \
    if (fault(path)) return -1;             \
    int(*real) arguments = dlsym(RTLD_NEXT, #name); \
    return real(__VA_ARGS__);               \
  }
ON_PATH(rename, (const char *path, const char *to), path, to)
ON_PATH(mkdir, (const char *path, mode_t mode), path, mode)
ON_PATH(chmod, (const char *path, mode_t mode), path, mode)
