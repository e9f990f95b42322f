// Calls a device plugin's socket the way the kubelet's library does: client SOCKET [AUTHORITY].
package main

import (
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"time"

	"github.com/golang/protobuf/ptypes/empty"
	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
)

func check(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func main() {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	options := []grpc.DialOption{
		grpc.WithInsecure(),
		grpc.WithBlock(),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", os.Args[1])
		}),
	}
	if len(os.Args) > 2 {
		options = append(options, grpc.WithAuthority(os.Args[2]))
	}
	// As the kubelet does: the target is the bare path, and the library makes the authority from it.
	connection, err := grpc.DialContext(ctx, os.Args[1], options...)
	check(err)
	const service = "/v1beta1.DevicePlugin/"
	// More than once, so that the compressed headers refer to earlier ones; and with headers that differ.
	for turn := 0; turn < 5; turn++ {
		ctx := metadata.AppendToOutgoingContext(ctx, "x-turn", strings.Repeat("t", turn*100), "x-same", "same")
		check(connection.Invoke(ctx, service+"GetDevicePluginOptions", &empty.Empty{}, &empty.Empty{}))
	}
	stream, err := connection.NewStream(ctx, &grpc.StreamDesc{ServerStreams: true}, service+"ListAndWatch")
	check(err)
	check(stream.SendMsg(&empty.Empty{}))
	check(stream.CloseSend())
	messages := 0
	for {
		if err = stream.RecvMsg(&empty.Empty{}); err != nil {
			break
		}
		messages++
	}
	if err != io.EOF || messages != 3 {
		check(fmt.Errorf("%d messages, then %v", messages, err))
	}
}
