// Calls a plugin through libcni, as container runtimes do:
//
//	libcni ADD|CHECK|DEL|VALIDATE CONFLIST CNI_PATH CACHE CAPABILITIES
//
// with the rest in the environment variables of the specification. Prints the result of ADD.
package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"strings"

	"github.com/containernetworking/cni/libcni"
)

func run() error {
	command, file, path, cache, capabilities := os.Args[1], os.Args[2], os.Args[3], os.Args[4], os.Args[5]
	list, err := libcni.ConfListFromFile(file)
	if err != nil {
		return err
	}
	rt := &libcni.RuntimeConf{
		ContainerID: os.Getenv("CNI_CONTAINERID"),
		NetNS:       os.Getenv("CNI_NETNS"),
		IfName:      os.Getenv("CNI_IFNAME"),
	}
	for _, pair := range strings.Split(os.Getenv("CNI_ARGS"), ";") {
		if key, value, ok := strings.Cut(pair, "="); ok {
			rt.Args = append(rt.Args, [2]string{key, value})
		}
	}
	if err := json.Unmarshal([]byte(capabilities), &rt.CapabilityArgs); err != nil {
		return err
	}
	cni := libcni.NewCNIConfigWithCacheDir([]string{path}, cache, nil)
	ctx := context.Background()
	switch command {
	case "ADD":
		result, err := cni.AddNetworkList(ctx, list, rt)
		if err != nil {
			return err
		}
		return result.PrintTo(os.Stdout)
	case "CHECK":
		return cni.CheckNetworkList(ctx, list, rt)
	case "DEL":
		return cni.DelNetworkList(ctx, list, rt)
	default:
		_, err := cni.ValidateNetworkList(ctx, list)
		return err
	}
}

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}
