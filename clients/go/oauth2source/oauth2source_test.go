package oauth2source_test

import (
	"context"
	"errors"
	"net"
	"testing"
	"time"

	"golang.org/x/oauth2"
	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/protobuf/types/known/durationpb"

	tokenbroker "github.com/token-broker/token-broker/clients/go"
	"github.com/token-broker/token-broker/clients/go/oauth2source"
	pb "github.com/token-broker/token-broker/clients/go/tokenbrokerv1"
)

type server struct {
	pb.UnimplementedTokenServiceServer
}

func (server) GetToken(context.Context, *pb.GetTokenRequest) (*pb.GetTokenResponse, error) {
	return &pb.GetTokenResponse{
		AccessToken: "secret", Generation: 1, ReuseFor: durationpb.New(time.Hour), ExpiresIn: durationpb.New(2 * time.Hour),
	}, nil
}

func newClient(t *testing.T) *tokenbroker.Client {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	g := grpc.NewServer()
	pb.RegisterTokenServiceServer(g, server{})
	healthy := health.NewServer()
	healthy.SetServingStatus(pb.TokenService_ServiceDesc.ServiceName, healthpb.HealthCheckResponse_SERVING)
	healthpb.RegisterHealthServer(g, healthy)
	go func() { _ = g.Serve(listener) }()
	t.Cleanup(g.Stop)
	client, err := tokenbroker.New(tokenbroker.Config{Endpoints: []string{"http://" + listener.Addr().String()}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = client.Close() })
	return client
}

func TestASourceReturnsValidTokensThatWrappersDoNotKeepForLong(t *testing.T) {
	var source oauth2.TokenSource = oauth2source.New(t.Context(), newClient(t), "acme")
	token, err := source.Token()
	if err != nil || token.AccessToken != "secret" || token.Type() != "Bearer" || !token.Valid() {
		t.Fatalf("%v %v", token, err)
	}
	if life := time.Until(token.Expiry); life > 15*time.Second {
		t.Fatalf("a wrapper would keep it for %s", life)
	}
}

func TestASourceReturnsTheErrorsOfTheClient(t *testing.T) {
	client := newClient(t)
	_ = client.Close()
	if _, err := oauth2source.New(t.Context(), client, "acme").Token(); !errors.Is(err, tokenbroker.ErrClosed) {
		t.Fatalf("%v", err)
	}
}
