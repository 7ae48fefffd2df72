/* getent hosts NAME, as musl's resolver finds it: Debian has no programs that are linked with musl. */
#include <arpa/inet.h>
#include <netdb.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>

int main(int argc, char **argv)
{
	struct addrinfo hints = {0}, *found, *a;

	if (argc != 3 || strcmp(argv[1], "hosts")) {
		fprintf(stderr, "usage: getent hosts NAME\n");
		return 1;
	}
	hints.ai_socktype = SOCK_STREAM;
	if (getaddrinfo(argv[2], NULL, &hints, &found))
		return 2;
	for (a = found; a; a = a->ai_next) {
		char text[INET6_ADDRSTRLEN];
		const void *addr = &((struct sockaddr_in *)a->ai_addr)->sin_addr;

		if (a->ai_family == AF_INET6)
			addr = &((struct sockaddr_in6 *)a->ai_addr)->sin6_addr;
		printf("%s  %s\n", inet_ntop(a->ai_family, addr, text, sizeof(text)), argv[2]);
	}
	return 0;
}
