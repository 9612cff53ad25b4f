/* Faults at chosen file operations of a process, for LD_PRELOAD.

   LION_FAULT_FOLDER: only operations on paths that contain this text count.
   LION_FAULT_ON: "reads" for operations that read (opening, reading, mapping, listing, looking at attributes);
     otherwise those that write (creating, writing, syncing, truncating, renaming) count.
   LION_FAULT_AT: number of the operation, counted from 1, at which the fault comes.
   LION_FAULT: the number of an errno that it and all later ones fail with; or what comes before the operation: "kill"
     for SIGKILL, "remove" or "truncate" for what another program does to its file, to half its size.
   LION_FAULT_COUNT: file that gets a byte for each operation. */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

#define REAL(type, name, ...) type (*real)(__VA_ARGS__) = dlsym(RTLD_NEXT, #name)

static long done;

static void halve(const char *path) {
  struct stat found;
  REAL(int, truncate64, const char *, off64_t);
  if (!lstat(path, &found) && S_ISREG(found.st_mode)) real(path, found.st_size / 2);
}

static int fault(const char *path, int reads) {
  const char *folder = getenv("LION_FAULT_FOLDER"), *at = getenv("LION_FAULT_AT"), *what = getenv("LION_FAULT");
  const char *count = getenv("LION_FAULT_COUNT"), *on = getenv("LION_FAULT_ON");
  if (!folder || !path || !strstr(path, folder) || reads != (on && !strcmp(on, "reads"))) return 0;
  done++;
  if (count) {
    int (*real_open)(const char *, int, ...) = dlsym(RTLD_NEXT, "open");
    ssize_t (*real_write)(int, const void *, size_t) = dlsym(RTLD_NEXT, "write");
    int file = real_open(count, O_WRONLY | O_CREAT | O_APPEND, 0666);
    if (file >= 0 && real_write(file, "x", 1) == 1) close(file);
  }
  if (!at || !what || done < atol(at)) return 0;
  if (!strcmp(what, "kill")) kill(getpid(), SIGKILL);
  if (!strcmp(what, "remove") || !strcmp(what, "truncate")) {
    if (done > atol(at)) return 0;
    if (*what == 'r') unlink(path);
    else halve(path);
    return 0;
  }
  errno = atoi(what);
  return 1;
}

static int fault_of(int file, int reads) {
  char link[64], path[4096];
  if (!getenv("LION_FAULT_FOLDER")) return 0;
  snprintf(link, sizeof link, "/proc/self/fd/%d", file);
  ssize_t size = readlink(link, path, sizeof path - 1);
  if (size < 0) return 0;
  path[size] = 0;
  return fault(path, reads);
}

#define OPEN(name)                                                 \
  int name(const char *path, int flags, ...) {                     \
    va_list rest;                                                  \
    va_start(rest, flags);                                         \
    mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0; \
    va_end(rest);                                                  \
    if (fault(path, !(flags & (O_WRONLY | O_RDWR | O_CREAT)))) return -1; \
    REAL(int, name, const char *, int, ...);                       \
    return real(path, flags, mode);                                \
  }
OPEN(open)
OPEN(open64)
#define ON_FILE(type, name, reads, failed, arguments, ...) \
  type name arguments {                      \
    if (fault_of(file, reads)) return failed; \
    type(*real) arguments = dlsym(RTLD_NEXT, #name); \
    return real(__VA_ARGS__);                \
  }
ON_FILE(ssize_t, write, 0, -1, (int file, const void *from, size_t size), file, from, size)
ON_FILE(ssize_t, pwrite64, 0, -1, (int file, const void *from, size_t size, off64_t at), file, from, size, at)
ON_FILE(int, fsync, 0, -1, (int file), file)
ON_FILE(int, ftruncate64, 0, -1, (int file, off64_t size), file, size)
ON_FILE(int, ftruncate, 0, -1, (int file, off_t size), file, size)
ON_FILE(ssize_t, read, 1, -1, (int file, void *to, size_t size), file, to, size)
ON_FILE(ssize_t, pread, 1, -1, (int file, void *to, size_t size, off_t at), file, to, size, at)
ON_FILE(ssize_t, pread64, 1, -1, (int file, void *to, size_t size, off64_t at), file, to, size, at)
ON_FILE(void *, mmap, 1, MAP_FAILED, (void *to, size_t size, int how, int flags, int file, off_t at), to, size, how,
        flags, file, at)
ON_FILE(void *, mmap64, 1, MAP_FAILED, (void *to, size_t size, int how, int flags, int file, off64_t at), to, size, how,
        flags, file, at)
#define ON_PATH(type, name, reads, failed, arguments, ...) \
  type name arguments {                     \
    if (fault(path, reads)) return failed;  \
    type(*real) arguments = dlsym(RTLD_NEXT, #name); \
    return real(__VA_ARGS__);               \
  }
ON_PATH(int, rename, 0, -1, (const char *path, const char *to), path, to)
ON_PATH(int, mkdir, 0, -1, (const char *path, mode_t mode), path, mode)
ON_PATH(int, chmod, 0, -1, (const char *path, mode_t mode), path, mode)
ON_PATH(int, stat, 1, -1, (const char *path, struct stat *to), path, to)
ON_PATH(int, stat64, 1, -1, (const char *path, struct stat64 *to), path, to)
ON_PATH(DIR *, opendir, 1, NULL, (const char *path), path)
ON_PATH(FILE *, fopen, 1, NULL, (const char *path, const char *mode), path, mode)
ON_PATH(FILE *, fopen64, 1, NULL, (const char *path, const char *mode), path, mode)
