// Preloaded with faults.c: the calls that only look. They change nothing that a kill or a power cut could leave, so they
// are counted where calls shall fail, and nowhere else.
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stddef.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include "faults.h"

static int looks(const char* name, int handle, const char* path) {
    char where[4096];
    return plan == FAIL && found(handle, path, where) ? step(name) : 0;
}

static int told(int handle, struct stat* now) {
    REAL(int, "fstat64", int, struct stat*);
    const int refused = looks("fstat", handle, NULL);
    return refused ? (errno = refused, -1) : real(handle, now);
}
int fstat(int handle, struct stat* now) { return told(handle, now); }
int fstat64(int handle, struct stat64* now) { return told(handle, (struct stat*)now); }
// Names of older C libraries, which torch is linked with.
int __fxstat(int version, int handle, struct stat* now) { return (void)version, told(handle, now); }
int __fxstat64(int version, int handle, struct stat64* now) { return (void)version, fstat64(handle, now); }

static int told_of(int folder, const char* path, struct stat* now, int flags) {
    REAL(int, "fstatat64", int, const char*, struct stat*, int);
    const int refused = looks("stat", folder, path);
    return refused ? (errno = refused, -1) : real(folder, path, now, flags);
}
#define TOLD(folder, flags) { return told_of(folder, path, (struct stat*)now, flags); }
int stat(const char* path, struct stat* now) TOLD(AT_FDCWD, 0)
int stat64(const char* path, struct stat64* now) TOLD(AT_FDCWD, 0)
int lstat(const char* path, struct stat* now) TOLD(AT_FDCWD, AT_SYMLINK_NOFOLLOW)
int lstat64(const char* path, struct stat64* now) TOLD(AT_FDCWD, AT_SYMLINK_NOFOLLOW)
int fstatat(int folder, const char* path, struct stat* now, int flags) TOLD(folder, flags)
int fstatat64(int folder, const char* path, struct stat64* now, int flags) TOLD(folder, flags)
int __xstat(int version, const char* path, struct stat* now) { return (void)version, stat(path, now); }
int __xstat64(int version, const char* path, struct stat64* now) { return (void)version, stat64(path, now); }
int __lxstat(int version, const char* path, struct stat* now) { return (void)version, lstat(path, now); }
int __lxstat64(int version, const char* path, struct stat64* now) { return (void)version, lstat64(path, now); }

static void* map(void* to, size_t bytes, int access, int flags, int handle, off_t offset) {
    REAL(void*, "mmap64", void*, size_t, int, int, int, off_t);
    const int refused = handle < 0 ? 0 : looks("mmap", handle, NULL);
    return refused ? (errno = refused, MAP_FAILED) : real(to, bytes, access, flags, handle, offset);
}
void* mmap(void* to, size_t n, int access, int flags, int handle, off_t offset) {
    return map(to, n, access, flags, handle, offset);
}
void* mmap64(void* to, size_t n, int access, int flags, int handle, off_t offset) {
    return map(to, n, access, flags, handle, offset);
}

static struct dirent* listed(DIR* folder) {
    REAL(struct dirent*, "readdir64", DIR*);
    const int refused = looks("readdir", dirfd(folder), NULL);
    return refused ? (errno = refused, NULL) : real(folder);
}
struct dirent* readdir(DIR* folder) { return listed(folder); }
struct dirent64* readdir64(DIR* folder) { return (struct dirent64*)listed(folder); }
