/* A preloaded library with which a program that tests watchers changes files on the host.
 *
 * Every call that changes something beneath $FSD_SUITE_MOUNT is made on the same path beneath
 * $FSD_SUITE_SOURCE. Calls that read, and watches, are left alone: they stay on the mount. So the
 * suites of watchers, which change files where they watch, become tests of what another machine
 * changes. Programs that are statically linked, or make system calls themselves, are not reached.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/types.h>
#include <unistd.h>
#include <utime.h>

typedef char Path[2 * PATH_MAX];

static const char *mount_root, *source_root;

__attribute__((constructor)) static void start(void)
{
    mount_root = getenv("FSD_SUITE_MOUNT");
    source_root = getenv("FSD_SUITE_SOURCE");
    if (mount_root)
        mount_root = strdup(mount_root); /* programs change their environment */
    if (source_root)
        source_root = strdup(source_root);
}

/* The path beneath the source, if this one is beneath the mount. */
static int swap(const char *path, char *out)
{
    size_t length;
    if (!mount_root || !source_root)
        return 0;
    length = strlen(mount_root);
    if (strncmp(path, mount_root, length) || (path[length] && path[length] != '/'))
        return 0;
    return snprintf(out, sizeof(Path), "%s%s", source_root, path + length) < (int)sizeof(Path);
}

static int of_descriptor(int fd, char *out)
{
    char link[64];
    ssize_t length;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    length = readlink(link, out, sizeof(Path) - 1);
    if (length < 0)
        return 0;
    out[length] = 0;
    return 1;
}

static int absolute(int at, const char *path, char *out)
{
    Path base;
    if (*path == '/')
        return snprintf(out, sizeof(Path), "%s", path) < (int)sizeof(Path);
    if (at == AT_FDCWD ? syscall(SYS_getcwd, base, sizeof base) < 0 : !of_descriptor(at, base))
        return 0;
    return snprintf(out, sizeof(Path), *path ? "%s/%s" : "%s", base, path) < (int)sizeof(Path);
}

/* Links on the way lead where they say, which may be beneath the mount again. */
static void walk(char *path, int follow)
{
    for (int turn = 0; turn < 8; turn++) {
        char real[PATH_MAX];
        Path next;
        char *slash = strrchr(path, '/'), *name = slash + 1;
        if (follow && realpath(path, real)) {
            if (!swap(real, next))
                return;
        } else {
            if (slash == path || !*name || !strcmp(name, ".") || !strcmp(name, ".."))
                return;
            *slash = 0;
            if (!realpath(path, real)) {
                *slash = '/';
                return;
            }
            *slash = '/';
            if (!swap(real, next))
                return;
            snprintf(next + strlen(next), sizeof next - strlen(next), "/%s", name);
        }
        strcpy(path, next);
    }
}

/* Whether the path is, or leads, beneath the mount; then `out` is where it is on the host. */
static int host_path(int at, const char *path, int follow, char *out)
{
    Path full;
    int saved = errno, found = 0;
    if (path && *path && mount_root && absolute(at, path, full)) {
        if (swap(full, out)) {
            walk(out, follow);
            found = 1;
        } else if (strncmp(full, "/proc/", 6) && strncmp(full, "/dev/", 5)) {
            strcpy(out, full);
            walk(out, follow);
            found = strcmp(out, full) != 0;
        }
    }
    errno = saved;
    return found;
}

#define REAL(name) \
    static __typeof__(name) *real; \
    if (!real) \
        real = (__typeof__(name) *)dlsym(RTLD_NEXT, #name)

/* -- opening ----------------------------------------------------------------------------------- */

static int changes(int flags)
{
    if (flags & O_PATH)
        return 0;
    return (flags & O_ACCMODE) != O_RDONLY || flags & (O_CREAT | O_TRUNC);
}

static mode_t mode_of(int flags, va_list list)
{
    return flags & O_CREAT || (flags & O_TMPFILE) == O_TMPFILE ? va_arg(list, mode_t) : 0;
}

#define OPEN(name) \
    int name(const char *path, int flags, ...) \
    { \
        REAL(name); \
        Path host; \
        va_list list; \
        va_start(list, flags); \
        mode_t mode = mode_of(flags, list); \
        va_end(list); \
        if (changes(flags) && host_path(AT_FDCWD, path, !(flags & O_NOFOLLOW), host)) \
            path = host; \
        return real(path, flags, mode); \
    }
OPEN(open)
OPEN(open64)

#define OPENAT(name) \
    int name(int at, const char *path, int flags, ...) \
    { \
        REAL(name); \
        Path host; \
        va_list list; \
        va_start(list, flags); \
        mode_t mode = mode_of(flags, list); \
        va_end(list); \
        if (changes(flags) && host_path(at, path, !(flags & O_NOFOLLOW), host)) \
            path = host; \
        return real(at, path, flags, mode); \
    }
OPENAT(openat)
OPENAT(openat64)

/* What open becomes with _FORTIFY_SOURCE. */
int __open_2(const char *path, int flags) { return open(path, flags); }
int __open64_2(const char *path, int flags) { return open64(path, flags); }
int __openat_2(int at, const char *path, int flags) { return openat(at, path, flags); }
int __openat64_2(int at, const char *path, int flags) { return openat64(at, path, flags); }

int creat(const char *path, mode_t mode) { return open(path, O_CREAT | O_WRONLY | O_TRUNC, mode); }
int creat64(const char *path, mode_t mode)
{
    return open64(path, O_CREAT | O_WRONLY | O_TRUNC, mode);
}

#define FOPEN(name) \
    FILE *name(const char *path, const char *mode) \
    { \
        REAL(name); \
        Path host; \
        if (strpbrk(mode, "wa+") && host_path(AT_FDCWD, path, 1, host)) \
            path = host; \
        return real(path, mode); \
    }
FOPEN(fopen)
FOPEN(fopen64)

#define FREOPEN(name) \
    FILE *name(const char *path, const char *mode, FILE *file) \
    { \
        REAL(name); \
        Path host; \
        if (path && strpbrk(mode, "wa+") && host_path(AT_FDCWD, path, 1, host)) \
            path = host; \
        return real(path, mode, file); \
    }
FREOPEN(freopen)
FREOPEN(freopen64)

/* What the C library makes of a template, without calls that can be caught: made on the host, and
 * its letters are given back. */
#define TEMPLATE(type, name, parameters, arguments, failed) \
    type name parameters \
    { \
        REAL(name); \
        Path host; \
        char *given = template; \
        if (!host_path(AT_FDCWD, template, 0, host)) \
            return real arguments; \
        template = host; \
        type made = real arguments; \
        if (made != (failed)) \
            strcpy(strrchr(given, '/') ? strrchr(given, '/') : given, \
                   strrchr(host, '/') + !strrchr(given, '/')); \
        return made; \
    }
TEMPLATE(int, mkstemp, (char *template), (template), -1)
TEMPLATE(int, mkstemp64, (char *template), (template), -1)
TEMPLATE(int, mkostemp, (char *template, int flags), (template, flags), -1)
TEMPLATE(int, mkostemp64, (char *template, int flags), (template, flags), -1)
TEMPLATE(int, mkstemps, (char *template, int suffix), (template, suffix), -1)
TEMPLATE(int, mkostemps, (char *template, int suffix, int flags), (template, suffix, flags), -1)
static char *made_directory(char *template, char *host, char *(*real)(char *))
{
    if (!real(host))
        return NULL;
    char *name = strrchr(template, '/');
    strcpy(name ? name : template, strrchr(host, '/') + !name);
    return template;
}
char *mkdtemp(char *template)
{
    REAL(mkdtemp);
    Path host;
    if (!host_path(AT_FDCWD, template, 0, host))
        return real(template);
    return made_directory(template, host, real);
}

/* -- calls with one path ------------------------------------------------------------------------ */

#define PATH(type, name, follow, parameters, arguments) \
    type name parameters \
    { \
        REAL(name); \
        Path host; \
        if (host_path(AT_FDCWD, path, follow, host)) \
            path = host; \
        return real arguments; \
    }
#define PATHAT(type, name, follow, parameters, arguments) \
    type name parameters \
    { \
        REAL(name); \
        Path host; \
        if (host_path(at, path, follow, host)) \
            path = host; \
        return real arguments; \
    }
#define FOLLOWS !(flags & AT_SYMLINK_NOFOLLOW)

PATH(int, mkdir, 0, (const char *path, mode_t mode), (path, mode))
PATHAT(int, mkdirat, 0, (int at, const char *path, mode_t mode), (at, path, mode))
PATH(int, mknod, 0, (const char *path, mode_t mode, dev_t device), (path, mode, device))
PATHAT(int, mknodat, 0, (int at, const char *path, mode_t mode, dev_t device),
       (at, path, mode, device))
PATH(int, mkfifo, 0, (const char *path, mode_t mode), (path, mode))
PATHAT(int, mkfifoat, 0, (int at, const char *path, mode_t mode), (at, path, mode))
PATH(int, rmdir, 0, (const char *path), (path))
PATH(int, unlink, 0, (const char *path), (path))
PATHAT(int, unlinkat, 0, (int at, const char *path, int flags), (at, path, flags))
PATH(int, remove, 0, (const char *path), (path))
PATH(int, truncate, 1, (const char *path, off_t size), (path, size))
PATH(int, truncate64, 1, (const char *path, off64_t size), (path, size))
PATH(int, chmod, 1, (const char *path, mode_t mode), (path, mode))
PATH(int, lchmod, 0, (const char *path, mode_t mode), (path, mode))
PATHAT(int, fchmodat, FOLLOWS, (int at, const char *path, mode_t mode, int flags),
       (at, path, mode, flags))
PATH(int, chown, 1, (const char *path, uid_t user, gid_t group), (path, user, group))
PATH(int, lchown, 0, (const char *path, uid_t user, gid_t group), (path, user, group))
PATH(int, utime, 1, (const char *path, const struct utimbuf *times), (path, times))
PATH(int, utimes, 1, (const char *path, const struct timeval times[2]), (path, times))
PATH(int, lutimes, 0, (const char *path, const struct timeval times[2]), (path, times))
PATHAT(int, futimesat, 1, (int at, const char *path, const struct timeval times[2]),
       (at, path, times))
PATH(int, setxattr, 1,
     (const char *path, const char *name, const void *value, size_t size, int flags),
     (path, name, value, size, flags))
PATH(int, lsetxattr, 0,
     (const char *path, const char *name, const void *value, size_t size, int flags),
     (path, name, value, size, flags))
PATH(int, removexattr, 1, (const char *path, const char *name), (path, name))
PATH(int, lremovexattr, 0, (const char *path, const char *name), (path, name))

/* These also mean a descriptor, by an empty path or none: then as the calls of descriptors below. */
static int at_host(int at, const char *path, int flags, char *out)
{
    if (path && *path)
        return host_path(at, path, FOLLOWS, out);
    Path own;
    return (!path || flags & AT_EMPTY_PATH) && of_descriptor(at, own) && swap(own, out);
}

int fchownat(int at, const char *path, uid_t user, gid_t group, int flags)
{
    REAL(fchownat);
    Path host;
    if (at_host(at, path, flags, host))
        return real(AT_FDCWD, host, user, group, flags & ~AT_EMPTY_PATH);
    return real(at, path, user, group, flags);
}

int utimensat(int at, const char *path, const struct timespec times[2], int flags)
{
    REAL(utimensat);
    Path host;
    if (at_host(at, path, flags, host))
        return real(AT_FDCWD, host, times, flags & ~AT_EMPTY_PATH);
    return real(at, path, times, flags);
}

/* -- calls with a descriptor: one that was opened to read is the mount's ------------------------ */

#define DESCRIPTOR(name, parameters, on_path, arguments) \
    int name parameters \
    { \
        REAL(name); \
        Path own, host; \
        if (mount_root && of_descriptor(fd, own) && swap(own, host)) \
            return on_path; \
        return real arguments; \
    }
DESCRIPTOR(fchmod, (int fd, mode_t mode), chmod(host, mode), (fd, mode))
DESCRIPTOR(fchown, (int fd, uid_t user, gid_t group), chown(host, user, group), (fd, user, group))
DESCRIPTOR(futimens, (int fd, const struct timespec times[2]),
           utimensat(AT_FDCWD, host, times, 0), (fd, times))
DESCRIPTOR(futimes, (int fd, const struct timeval times[2]), utimes(host, times), (fd, times))
DESCRIPTOR(fsetxattr, (int fd, const char *name, const void *value, size_t size, int flags),
           setxattr(host, name, value, size, flags), (fd, name, value, size, flags))
DESCRIPTOR(fremovexattr, (int fd, const char *name), removexattr(host, name), (fd, name))

/* -- calls with two paths ----------------------------------------------------------------------- */

int renameat2(int old_at, const char *old, int new_at, const char *new, unsigned flags)
{
    REAL(renameat2);
    Path old_host, new_host;
    if (host_path(old_at, old, 0, old_host))
        old = old_host;
    if (host_path(new_at, new, 0, new_host))
        new = new_host;
    return real(old_at, old, new_at, new, flags);
}
int renameat(int old_at, const char *old, int new_at, const char *new)
{
    return renameat2(old_at, old, new_at, new, 0);
}
int rename(const char *old, const char *new)
{
    return renameat2(AT_FDCWD, old, AT_FDCWD, new, 0);
}

int linkat(int old_at, const char *old, int new_at, const char *new, int flags)
{
    REAL(linkat);
    Path old_host, new_host;
    if (host_path(old_at, old, flags & AT_SYMLINK_FOLLOW, old_host))
        old = old_host;
    if (host_path(new_at, new, 0, new_host))
        new = new_host;
    return real(old_at, old, new_at, new, flags);
}
int link(const char *old, const char *new) { return linkat(AT_FDCWD, old, AT_FDCWD, new, 0); }

/* The target is text: where it leads is decided where it is followed. */
int symlinkat(const char *target, int at, const char *path)
{
    REAL(symlinkat);
    Path host;
    if (host_path(at, path, 0, host))
        path = host;
    return real(target, at, path);
}
int symlink(const char *target, const char *path) { return symlinkat(target, AT_FDCWD, path); }
