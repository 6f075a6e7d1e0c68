/* Preloaded into tests and all that they start, see `make ahead`: the clock is AHEAD seconds ahead, and with it the
 * times of files, which come from the kernel's. Clocks that only measure, and what is slept or waited for, are left.
 * (Debian's faketime knows no stat64, and its short sleeps fail.) */
#define _GNU_SOURCE
#include <fcntl.h>
#include <semaphore.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

int clock_gettime(clockid_t clock, struct timespec *now) {
    int failed = syscall(SYS_clock_gettime, clock, now);
    if (!failed && (clock == CLOCK_REALTIME || clock == CLOCK_REALTIME_COARSE)) now->tv_sec += AHEAD;
    return failed;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
    int failed = syscall(SYS_gettimeofday, now, zone);
    if (!failed) now->tv_sec += AHEAD;
    return failed;
}

time_t time(time_t *result) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (result) *result = now.tv_sec;
    return now.tv_sec;
}

int sem_timedwait(sem_t *restrict semaphore, const struct timespec *restrict end) {
    struct timespec real = {end->tv_sec - AHEAD, end->tv_nsec};
    return sem_clockwait(semaphore, CLOCK_REALTIME, &real);
}

int fstatat(int folder, const char *restrict path, struct stat *restrict facts, int flags) {
    int failed = syscall(SYS_newfstatat, folder, path, facts, flags);
    if (!failed) facts->st_mtime += AHEAD, facts->st_atime += AHEAD, facts->st_ctime += AHEAD;
    return failed;
}

int stat(const char *restrict path, struct stat *restrict facts) { return fstatat(AT_FDCWD, path, facts, 0); }
int lstat(const char *restrict path, struct stat *restrict facts) {
    return fstatat(AT_FDCWD, path, facts, AT_SYMLINK_NOFOLLOW);
}
int fstat(int file, struct stat *facts) { return fstatat(file, "", facts, AT_EMPTY_PATH); }

/* Built without large files in mind: on 64 bits these are the same. */
int fstatat64(int, const char *restrict, struct stat64 *restrict, int) __attribute__((alias("fstatat")));
int stat64(const char *restrict, struct stat64 *restrict) __attribute__((alias("stat")));
int lstat64(const char *restrict, struct stat64 *restrict) __attribute__((alias("lstat")));
int fstat64(int, struct stat64 *) __attribute__((alias("fstat")));

static int set_times(int folder, const char *path, const struct timespec *times, int flags) {
    struct timespec real[2];
    if (!times) return syscall(SYS_utimensat, folder, path, 0, flags);
    for (int i = 0; i < 2; i++) {
        real[i] = times[i];
        if (times[i].tv_nsec != UTIME_NOW && times[i].tv_nsec != UTIME_OMIT) real[i].tv_sec -= AHEAD;
    }
    return syscall(SYS_utimensat, folder, path, real, flags);
}

int utimensat(int folder, const char *path, const struct timespec times[2], int flags) {
    return set_times(folder, path, times, flags);
}
int futimens(int file, const struct timespec times[2]) { return set_times(file, 0, times, 0); }
