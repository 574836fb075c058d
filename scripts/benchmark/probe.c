/* Timed loops of system calls: prints the seconds that the whole loop took.
 *
 *   probe stat LIST            lstat(2) of each path
 *   probe cat LIST             open, read to the end, close
 *   probe pread FILE N SIZE    N reads of SIZE bytes at random offsets
 *   probe pwrite FILE N SIZE   N writes of SIZE bytes at random offsets
 *   probe create DIR N         N new files
 *   probe unlink DIR N         … deleted again
 *
 * LIST holds paths that end in NUL bytes. Offsets come from a fixed seed: every peer does the same.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

static char buffer[1 << 20];

static double now(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec + t.tv_nsec / 1e9;
}

static void die(const char *what)
{
	perror(what);
	exit(1);
}

static char *slurp(const char *path, size_t *size)
{
	struct stat st;
	int fd = open(path, O_RDONLY);
	if (fd < 0 || fstat(fd, &st))
		die(path);
	char *data = malloc(st.st_size + 1);
	if (read(fd, data, st.st_size) != st.st_size)
		die(path);
	close(fd);
	*size = st.st_size;
	return data;
}

static void stat_one(const char *path)
{
	struct stat st;
	if (lstat(path, &st) && errno != ENOENT)
		die(path);
}

static void cat_one(const char *path)
{
	int fd = open(path, O_RDONLY);
	if (fd < 0)
		die(path);
	while (read(fd, buffer, sizeof buffer) > 0)
		;
	close(fd);
}

static void positions(const char *path, int writing, long count, long size)
{
	struct stat st;
	int fd = open(path, writing ? O_RDWR : O_RDONLY);
	if (fd < 0 || fstat(fd, &st))
		die(path);
	uint64_t state = 88172645463325252ull, slots = st.st_size / size;
	for (long i = 0; i < count; i++) {
		state ^= state << 13, state ^= state >> 7, state ^= state << 17; /* xorshift64 */
		off_t offset = (state % slots) * size;
		ssize_t n = writing ? pwrite(fd, buffer, size, offset) : pread(fd, buffer, size, offset);
		if (n != size)
			die(path);
	}
	if (close(fd))
		die(path);
}

int main(int argc, char **argv)
{
	if (argc < 3)
		return 2;
	const char *mode = argv[1], *path = argv[2];
	long count = argc > 3 ? atol(argv[3]) : 0, size = argc > 4 ? atol(argv[4]) : 0;
	double start;

	if (!strcmp(mode, "stat") || !strcmp(mode, "cat")) {
		size_t length;
		char *list = slurp(path, &length);
		start = now();
		for (char *p = list; p < list + length; p += strlen(p) + 1)
			(*mode == 's' ? stat_one : cat_one)(p);
	} else if (!strcmp(mode, "pread") || !strcmp(mode, "pwrite")) {
		start = now();
		positions(path, mode[1] == 'w', count, size);
	} else {
		if (chdir(path))
			die(path);
		start = now();
		for (long i = 0; i < count; i++) {
			char name[32];
			snprintf(name, sizeof name, "file%07ld", i);
			if (*mode == 'u') {
				if (unlink(name))
					die(name);
			} else {
				int fd = open(name, O_CREAT | O_EXCL | O_WRONLY, 0644);
				if (fd < 0)
					die(name);
				close(fd);
			}
		}
	}
	printf("%.9f\n", now() - start);
	return 0;
}
