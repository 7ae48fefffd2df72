// Command ask asks for names from where it is: in a pod of the test cluster. Without arguments
// it only waits to be ended, as a pod's sandbox and a pod to ask from do.
//
//	ask lookup NAME   looks an address up as any program does, with the pod's resolv.conf
//	ask load JSON     runs loads until they end or stdin does, and writes their results as JSON
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"github.com/contentful-labs/coredns-nodecache/test/lab"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "ask:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	switch {
	case len(args) == 0:
		ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
		defer stop()
		<-ctx.Done()
		return nil
	case len(args) == 2 && args[0] == "lookup":
		addrs, err := net.DefaultResolver.LookupHost(context.Background(), args[1])
		if err != nil {
			return err
		}
		fmt.Println(strings.Join(addrs, " "))
		return nil
	case len(args) == 2 && args[0] == "load":
		return load(args[1])
	}
	return errors.New("usage: ask [lookup NAME | load JSON]")
}

func load(text string) error {
	var loads []lab.Load
	if err := json.Unmarshal([]byte(text), &loads); err != nil {
		return fmt.Errorf("reading the loads: %w", err)
	}
	var running []*lab.Running
	for _, l := range loads {
		r, err := l.Start()
		if err != nil {
			return err
		}
		running = append(running, r)
	}
	fmt.Println("running")
	done := make(chan error, 2)
	go func() {
		_, err := io.Copy(io.Discard, os.Stdin)
		done <- err
	}()
	go func() {
		var errs []error
		for _, r := range running {
			_, err := r.Wait()
			errs = append(errs, err)
		}
		done <- errors.Join(errs...)
	}()
	if err := <-done; err != nil {
		return err
	}
	var results []*lab.Result
	for _, r := range running {
		result, err := r.Stop()
		if err != nil {
			return err
		}
		results = append(results, result)
	}
	return json.NewEncoder(os.Stdout).Encode(results)
}
