package tokenbroker

import (
	"context"
	"io"
	"log/slog"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/protoadapt"
	"google.golang.org/protobuf/types/known/durationpb"

	"crypto/tls"

	pb "github.com/token-broker/token-broker/clients/go/tokenbrokerv1"
)

// fakeBroker is a broker in the process. It answers as the functions say that a test sets, on the fake clock of
// synctest.
type fakeBroker struct {
	get    func(ctx context.Context, request *pb.GetTokenRequest) (*pb.GetTokenResponse, error)
	report func(ctx context.Context, request *pb.ReportRejectedTokenRequest) (*pb.ReportRejectedTokenResponse, error)
	watch  func(request *pb.WatchTokensRequest) error // nil: the stream is accepted

	trailer metadata.MD

	mu      sync.Mutex
	gets    []*pb.GetTokenRequest
	reports []*pb.ReportRejectedTokenRequest
	streams []*fakeStream
	hanging int // so many streams are never answered
	bearers []string
}

func (b *fakeBroker) GetToken(ctx context.Context, request *pb.GetTokenRequest, options ...grpc.CallOption) (*pb.GetTokenResponse, error) {
	b.called(ctx, options)
	b.mu.Lock()
	b.gets = append(b.gets, request)
	b.mu.Unlock()
	return b.get(ctx, request)
}

func (b *fakeBroker) ReportRejectedToken(ctx context.Context, request *pb.ReportRejectedTokenRequest, options ...grpc.CallOption) (*pb.ReportRejectedTokenResponse, error) {
	b.called(ctx, options)
	b.mu.Lock()
	b.reports = append(b.reports, request)
	b.mu.Unlock()
	return b.report(ctx, request)
}

func (b *fakeBroker) WatchTokens(ctx context.Context, request *pb.WatchTokensRequest, options ...grpc.CallOption) (grpc.ServerStreamingClient[pb.WatchTokensResponse], error) {
	b.called(ctx, options)
	s := &fakeStream{ctx: ctx, accounts: request.GetAccounts(), messages: make(chan *pb.WatchTokensResponse), end: make(chan error, 1), openedAt: time.Now()}
	if b.watch != nil {
		s.refusal = b.watch(request)
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	s.hangs = len(b.streams) < b.hanging
	b.streams = append(b.streams, s)
	return s, nil
}

func (*fakeBroker) ListAccounts(context.Context, *pb.ListAccountsRequest, ...grpc.CallOption) (*pb.ListAccountsResponse, error) {
	return nil, status.Error(codes.Unimplemented, "not called by the client")
}

// called notes the bearer of a call and sets its trailer.
func (b *fakeBroker) called(ctx context.Context, options []grpc.CallOption) {
	headers, _ := metadata.FromOutgoingContext(ctx)
	b.mu.Lock()
	defer b.mu.Unlock()
	b.bearers = append(b.bearers, headers.Get("authorization")...)
	for _, option := range options {
		if trailer, ok := option.(grpc.TrailerCallOption); ok {
			*trailer.TrailerAddr = b.trailer
		}
	}
}

func (b *fakeBroker) asked() int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return len(b.gets)
}

// stream returns the newest stream, and how many there were.
func (b *fakeBroker) stream() (*fakeStream, int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if len(b.streams) == 0 {
		return nil, 0
	}
	return b.streams[len(b.streams)-1], len(b.streams)
}

type fakeStream struct {
	grpc.ClientStream
	ctx      context.Context
	accounts []string
	refusal  error
	messages chan *pb.WatchTokensResponse
	end      chan error
	openedAt time.Time
	hangs    bool // it is never answered
}

func (s *fakeStream) Header() (metadata.MD, error) {
	if s.hangs {
		<-s.ctx.Done()
		return nil, s.ctx.Err()
	}
	if s.refusal != nil {
		return nil, nil
	}
	return metadata.MD{}, nil
}

func (s *fakeStream) Recv() (*pb.WatchTokensResponse, error) {
	if s.refusal != nil {
		return nil, s.refusal
	}
	select {
	case m := <-s.messages:
		return m, nil
	case err := <-s.end:
		return nil, err
	case <-s.ctx.Done():
		return nil, status.FromContextError(s.ctx.Err()).Err()
	}
}

func (s *fakeStream) push(account string, token *pb.GetTokenResponse) {
	s.messages <- &pb.WatchTokensResponse{Account: account, Event: &pb.WatchTokensResponse_Token{Token: token}}
	synctest.Wait()
}

func (s *fakeStream) endAccount(account string) {
	s.messages <- &pb.WatchTokensResponse{Account: account, Event: &pb.WatchTokensResponse_Ended{
		Ended: &pb.AccountEnded{Reason: pb.AccountEnded_REASON_REMOVED},
	}}
	synctest.Wait()
}

const secretText = "eyJ-this-is-the-secret"

// answer is a token that is to be used again for a minute, and ends after two.
func answer(generation uint64) *pb.GetTokenResponse {
	return &pb.GetTokenResponse{
		AccessToken: secretText,
		Generation:  generation,
		ReuseFor:    durationpb.New(time.Minute),
		ExpiresIn:   durationpb.New(2 * time.Minute),
		ApiBaseUrl:  "https://api.example",
	}
}

func always(generation uint64) func(context.Context, *pb.GetTokenRequest) (*pb.GetTokenResponse, error) {
	return func(context.Context, *pb.GetTokenRequest) (*pb.GetTokenResponse, error) {
		return answer(generation), nil
	}
}

func failing(err error) func(context.Context, *pb.GetTokenRequest) (*pb.GetTokenResponse, error) {
	return func(context.Context, *pb.GetTokenRequest) (*pb.GetTokenResponse, error) { return nil, err }
}

// hanging never answers before its deadline.
func hanging(ctx context.Context, _ *pb.GetTokenRequest) (*pb.GetTokenResponse, error) {
	<-ctx.Done()
	return nil, status.FromContextError(ctx.Err()).Err()
}

// refusal is a status with details, as the broker sends it.
func refusal(code codes.Code, reason string, retryAfter time.Duration) error {
	details := []protoadapt.MessageV1{}
	if reason != "" {
		details = append(details, &errdetails.ErrorInfo{Domain: "token-broker", Reason: reason, Metadata: map[string]string{"upstream_code": "61001"}})
	}
	if retryAfter > 0 {
		details = append(details, &errdetails.RetryInfo{RetryDelay: durationpb.New(retryAfter)})
	}
	s, err := status.New(code, "the text of the broker").WithDetails(details...)
	if err != nil {
		panic(err)
	}
	return s.Err()
}

// newClient returns a client of the fake broker. Call it within a bubble of synctest.
func newClient(t *testing.T, broker *fakeBroker) *Client {
	t.Helper()
	client, err := New(Config{Endpoints: []string{"http://127.0.0.1:1"}, Logger: slog.New(slog.NewTextHandler(io.Discard, nil))})
	if err != nil {
		t.Fatal(err)
	}
	useBroker(client, broker)
	t.Cleanup(func() { _ = client.Close() })
	return client
}

func useBroker(client *Client, broker *fakeBroker) {
	client.core.connector.dial = func(*tls.Config) (pb.TokenServiceClient, func(), error) { return broker, func() {}, nil }
}

func mustToken(t *testing.T, client *Client, account string) *Token {
	t.Helper()
	token, err := client.Token(t.Context(), account)
	if err != nil {
		t.Fatal(err)
	}
	return token
}

func wantGeneration(t *testing.T, token *Token, generation uint64) {
	t.Helper()
	if token.Generation() != generation {
		t.Fatalf("generation %d, expected %d", token.Generation(), generation)
	}
}

func wantAsked(t *testing.T, broker *fakeBroker, times int) {
	t.Helper()
	if asked := broker.asked(); asked != times {
		t.Fatalf("asked %d times, expected %d", asked, times)
	}
}

func wantStream(t *testing.T, broker *fakeBroker, count int, accounts ...string) *fakeStream {
	t.Helper()
	s, opened := broker.stream()
	if opened != count || s != nil && !slices.Equal(s.accounts, accounts) {
		t.Fatalf("%d streams, the newest is %+v; expected %d, the newest with %v", opened, s, count, accounts)
	}
	return s
}
