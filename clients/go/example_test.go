package tokenbroker_test

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/protobuf/types/known/durationpb"

	tokenbroker "github.com/token-broker/token-broker/clients/go"
	pb "github.com/token-broker/token-broker/clients/go/tokenbrokerv1"
)

func Example() {
	defer startBrokerAndAPI()()

	client, err := tokenbroker.New(tokenbroker.ConfigFromEnv())
	if err != nil {
		panic(err)
	}
	defer client.Close()
	token, err := client.Token(context.Background(), "acme")
	if err != nil {
		panic(err)
	}
	api := &http.Client{Transport: &tokenbroker.Transport{Client: client, Account: "acme"}}
	response, err := api.Get(token.APIBaseURL() + "/whoami")
	if err != nil {
		panic(err)
	}
	fmt.Println(response.Status)
	_ = response.Body.Close()
	// Output: 200 OK
}

type exampleServer struct {
	pb.UnimplementedTokenServiceServer
	apiURL string
}

func (s exampleServer) GetToken(context.Context, *pb.GetTokenRequest) (*pb.GetTokenResponse, error) {
	return &pb.GetTokenResponse{
		AccessToken: "secret", Generation: 1, ApiBaseUrl: s.apiURL,
		ReuseFor: durationpb.New(time.Minute), ExpiresIn: durationpb.New(time.Hour),
	}, nil
}

// startBrokerAndAPI starts an API and a broker with tokens for it, and sets the environment for that.
func startBrokerAndAPI() (stop func()) {
	api := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Authorization") != "Bearer secret" {
			w.WriteHeader(http.StatusUnauthorized)
		}
	}))
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		panic(err)
	}
	server := grpc.NewServer()
	pb.RegisterTokenServiceServer(server, exampleServer{apiURL: api.URL})
	healthy := health.NewServer()
	healthy.SetServingStatus(pb.TokenService_ServiceDesc.ServiceName, healthpb.HealthCheckResponse_SERVING)
	healthpb.RegisterHealthServer(server, healthy)
	go func() { _ = server.Serve(listener) }()

	directory, err := os.MkdirTemp("", "token-broker-example")
	if err != nil {
		panic(err)
	}
	bearer := filepath.Join(directory, "bearer")
	for _, problem := range []error{
		os.WriteFile(bearer, []byte("tbk_example\n"), 0o600),
		os.Setenv("TOKEN_BROKER_ENDPOINT", "http://"+listener.Addr().String()),
		os.Setenv("TOKEN_BROKER_BEARER_FILE", bearer),
	} {
		if problem != nil {
			panic(problem)
		}
	}
	return func() {
		_ = os.Unsetenv("TOKEN_BROKER_ENDPOINT")
		_ = os.Unsetenv("TOKEN_BROKER_BEARER_FILE")
		_ = os.RemoveAll(directory)
		server.Stop()
		api.Close()
	}
}
