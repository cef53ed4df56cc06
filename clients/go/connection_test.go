package tokenbroker

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	pb "github.com/token-broker/token-broker/clients/go/tokenbrokerv1"
)

// server is a broker behind a real connection. It notes who asked.
type server struct {
	pb.UnimplementedTokenServiceServer
	address string
	health  *health.Server

	mu     sync.Mutex
	asked  int
	names  []string // the common names of the certificates that were shown by those who asked
	bearer []string
}

func (s *server) GetToken(ctx context.Context, r *pb.GetTokenRequest) (*pb.GetTokenResponse, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.asked++
	s.names = append(s.names, peerName(ctx))
	headers, _ := metadata.FromIncomingContext(ctx)
	s.bearer = headers.Get("authorization")
	if r.GetAccount() == "away" {
		return nil, status.Error(codes.Unavailable, "the upstream is away")
	}
	return answer(1), nil
}

func (s *server) WatchTokens(_ *pb.WatchTokensRequest, stream grpc.ServerStreamingServer[pb.WatchTokensResponse]) error {
	if err := stream.SendHeader(metadata.MD{}); err != nil {
		return err
	}
	<-stream.Context().Done()
	return nil
}

func (s *server) count() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.asked
}

func (s *server) lastName() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.names[len(s.names)-1]
}

func peerName(ctx context.Context) string {
	p, _ := peer.FromContext(ctx)
	info, ok := p.AuthInfo.(credentials.TLSInfo)
	if !ok || len(info.State.PeerCertificates) == 0 {
		return ""
	}
	return info.State.PeerCertificates[0].Subject.CommonName
}

func serve(t *testing.T, options ...grpc.ServerOption) *server {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := &server{address: listener.Addr().String(), health: health.NewServer()}
	s.health.SetServingStatus(pb.TokenService_ServiceDesc.ServiceName, healthpb.HealthCheckResponse_SERVING)
	g := grpc.NewServer(options...)
	pb.RegisterTokenServiceServer(g, s)
	healthpb.RegisterHealthServer(g, s.health)
	served := make(chan error, 1)
	go func() { served <- g.Serve(listener) }()
	t.Cleanup(func() {
		g.Stop()
		if err := <-served; err != nil {
			t.Error(err)
		}
	})
	return s
}

// authority makes certificates.
type authority struct {
	certificate *x509.Certificate
	key         *ecdsa.PrivateKey
	pem         []byte
}

func newAuthority(t *testing.T) *authority {
	t.Helper()
	a := &authority{}
	a.pem, a.key = a.issue(t, "authority")
	block, _ := pem.Decode(a.pem)
	var err error
	if a.certificate, err = x509.ParseCertificate(block.Bytes); err != nil {
		t.Fatal(err)
	}
	return a
}

func (a *authority) issue(t *testing.T, name string) ([]byte, *ecdsa.PrivateKey) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber:          big.NewInt(time.Now().UnixNano()),
		Subject:               pkix.Name{CommonName: name},
		NotBefore:             time.Now().Add(-time.Hour),
		NotAfter:              time.Now().Add(time.Hour),
		DNSNames:              []string{"localhost"},
		BasicConstraintsValid: true,
		IsCA:                  a.certificate == nil,
	}
	parent, signer := a.certificate, a.key
	if parent == nil {
		parent, signer = template, key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, key.Public(), signer)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), key
}

func keyPEM(t *testing.T, key *ecdsa.PrivateKey) []byte {
	t.Helper()
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})
}

// serveTLS starts a server for localhost that wants certificates of the authority.
func serveTLS(t *testing.T, a *authority) *server {
	t.Helper()
	certificate, key := a.issue(t, "broker")
	pair, err := tls.X509KeyPair(certificate, keyPEM(t, key))
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AddCert(a.certificate)
	return serve(t, grpc.Creds(credentials.NewTLS(&tls.Config{
		Certificates: []tls.Certificate{pair}, ClientCAs: pool, ClientAuth: tls.VerifyClientCertIfGiven,
	})))
}

func write(t *testing.T, directory, name string, content []byte) string {
	t.Helper()
	path := filepath.Join(directory, name)
	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func open(t *testing.T, config Config) *Client {
	t.Helper()
	client, err := New(config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = client.Close() })
	return client
}

func (s *server) tlsEndpoint() string {
	_, port, _ := net.SplitHostPort(s.address)
	return "https://localhost:" + port
}

func TestACertificateIdentifiesTheCallerAndARotatedOneIsUsedAfterwards(t *testing.T) {
	a := newAuthority(t)
	s := serveTLS(t, a)
	directory := t.TempDir()
	first, firstKey := a.issue(t, "first")
	var log bytes.Buffer
	client := open(t, Config{
		Endpoints:      []string{s.tlsEndpoint()},
		CAFile:         write(t, directory, "ca", a.pem),
		ClientCertFile: write(t, directory, "cert", first),
		ClientKeyFile:  write(t, directory, "key", keyPEM(t, firstKey)),
		Logger:         slog.New(slog.NewTextHandler(&log, nil)),
	})
	mustToken(t, client, "one")
	if name := s.lastName(); name != "first" {
		t.Fatal(name)
	}

	// A certificate without its key is not used. The clock of the files is set back instead of waited for.
	k := client.core.connector
	lookNow := func() {
		k.mu.Lock()
		k.readAt = time.Now().Add(-lookInterval)
		k.mu.Unlock()
	}
	second, secondKey := a.issue(t, "second")
	write(t, directory, "cert", second)
	for i := range 3 {
		lookNow()
		mustToken(t, client, fmt.Sprint("torn", i))
		if name := s.lastName(); name != "first" {
			t.Fatal(name)
		}
	}
	write(t, directory, "key", keyPEM(t, secondKey))
	lookNow()
	mustToken(t, client, "two")
	if name := s.lastName(); name != "second" {
		t.Fatal(name)
	}
	_ = client.Close()
	if warnings := strings.Count(log.String(), "cannot be used"); warnings != 1 {
		t.Fatalf("%d warnings: %s", warnings, log.String())
	}
}

func TestACallOnAReplacedConnectionIsCompletedBeforeThatIsClosed(t *testing.T) {
	a := newAuthority(t)
	directory := t.TempDir()
	config := Config{Endpoints: []string{"https://localhost:1"}, CAFile: write(t, directory, "ca", a.pem)}
	k := open(t, config).core.connector
	closed := 0
	k.dial = func(*tls.Config) (pb.TokenServiceClient, func(), error) { return nil, func() { closed++ }, nil }
	first, err := k.acquire()
	if err != nil {
		t.Fatal(err)
	}
	write(t, directory, "ca", newAuthority(t).pem)
	k.readAt = time.Now().Add(-lookInterval)
	second, err := k.acquire()
	if err != nil || second == first || closed != 0 {
		t.Fatalf("%p %p %d %v", first, second, closed, err)
	}
	k.release(first)
	if closed != 1 {
		t.Fatalf("closed %d times", closed)
	}
	k.release(second)
	if closed != 1 {
		t.Fatal("the current connection was closed")
	}
}

func TestABrokerOfAnotherAuthorityIsNotTrusted(t *testing.T) {
	s := serveTLS(t, newAuthority(t))
	client := open(t, Config{Endpoints: []string{s.tlsEndpoint()}, CAFile: write(t, t.TempDir(), "ca", newAuthority(t).pem)})
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	_, err := client.Token(ctx, "acme")
	if !errors.Is(err, ErrUnavailable) || !strings.Contains(err.Error(), "certificate") {
		t.Fatalf("%v", err)
	}
	if s.count() != 0 {
		t.Fatal("it was asked")
	}
}

func TestCallsAreSpreadOverAllEndpointsAndGoOnWithoutOneThatIsAway(t *testing.T) {
	first, second := serve(t), serve(t)
	client := open(t, Config{Endpoints: []string{"http://127.0.0.1:1", "http://" + first.address, "http://" + second.address}})
	for i := 0; first.count() == 0 || second.count() == 0; i++ {
		if i == 1000 {
			t.Fatalf("%d and %d calls", first.count(), second.count())
		}
		mustToken(t, client, fmt.Sprint("account", i))
	}
}

func TestAReplicaThatSaysItIsStoppingGetsNoMoreCalls(t *testing.T) {
	stopping, other := serve(t), serve(t)
	stopping.health.SetServingStatus(pb.TokenService_ServiceDesc.ServiceName, healthpb.HealthCheckResponse_NOT_SERVING)
	client := open(t, Config{Endpoints: []string{"http://" + stopping.address, "http://" + other.address}})
	for i := range 20 {
		mustToken(t, client, fmt.Sprint("account", i))
	}
	if stopping.count() != 0 || other.count() != 20 {
		t.Fatalf("%d and %d calls", stopping.count(), other.count())
	}
}

func TestMakingAClientNeedsNoBrokerAndAskingSaysThatThereIsNone(t *testing.T) {
	client := open(t, Config{Endpoints: []string{"http://127.0.0.1:1"}, Timeout: 300 * time.Millisecond})
	if _, err := client.Token(t.Context(), "acme"); !errors.Is(err, ErrUnavailable) {
		t.Fatalf("%v", err)
	}
}

func TestNeitherTokensNorBearersAreInAnyTextOrLog(t *testing.T) {
	const bearer = "tbk_this-is-the-bearer"
	s := serve(t)
	file := write(t, t.TempDir(), "bearer", []byte(" "+bearer+"\n"))
	var log bytes.Buffer
	config := Config{
		Endpoints:  []string{"http://" + s.address},
		BearerFile: file,
		Timeout:    300 * time.Millisecond,
		Logger:     slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug})),
	}
	client := open(t, config)
	token := mustToken(t, client, "acme")
	if token.AccessToken() != secretText || s.bearer[0] != "Bearer "+bearer {
		t.Fatal("the token or the bearer did not arrive")
	}
	_, tokenErr := client.Token(t.Context(), "away")
	_ = client.Close()

	text := log.String()
	type nested struct {
		Token   *Token
		value   Token
		pointer *Token
		client  *Client
	}
	for _, value := range []any{token, *token, client, config, tokenErr, nested{token, *token, token, client}} {
		for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%d"} {
			text += fmt.Sprintf(verb+"\n", value)
		}
		var logged bytes.Buffer
		slog.New(slog.NewJSONHandler(&logged, nil)).Info("x", "value", value)
		slog.New(slog.NewTextHandler(&logged, nil)).Info("x", "value", value)
		text += logged.String()
	}
	for _, secret := range []string{secretText, bearer, fmt.Sprintf("%x", secretText), fmt.Sprintf("%X", bearer)} {
		if strings.Contains(text, secret) {
			t.Errorf("a secret is in %s", text)
		}
	}
	if !strings.Contains(text, "token of account acme, generation 1") || !strings.Contains(text, "the broker answered") {
		t.Errorf("the texts are not what is expected: %s", text)
	}
}
