package tokenbroker

import (
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	_ "embed"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	_ "google.golang.org/grpc/health" // checks the health of each connection, as the service config says
	"google.golang.org/grpc/keepalive"

	pb "github.com/token-broker/token-broker/clients/go/tokenbrokerv1"
)

// Version is the version of this package.
const Version = "0.1.0"

//go:embed service_config.json
var serviceConfig string

// connection is a connection, or several to several replicas, that calls hold while they use it.
type connection struct {
	service pb.TokenServiceClient
	close   func()
	users   int
	retired bool // another one has taken its place: it is closed when nobody uses it
}

// connector makes connections, and a new one when the files of the certificates have changed.
type connector struct {
	dial    func(*tls.Config) (pb.TokenServiceClient, func(), error) // with nil for plaintext
	files   certificateFiles
	tls     bool
	logger  *slog.Logger
	changed func() // called after another connection has taken the place of one

	mu      sync.Mutex
	config  *tls.Config
	digest  [sha256.Size]byte // of the files' content that config was made of
	problem string            // why the files could not be used when they were last read; logged once
	readAt  time.Time
	current *connection
	closed  bool
}

// newConnector reads the certificates. It opens no connection.
func newConnector(c *Config, e *endpoints, logger *slog.Logger) (*connector, *Error) {
	k := &connector{
		dial:   func(config *tls.Config) (pb.TokenServiceClient, func(), error) { return dial(e.hosts, config) },
		files:  certificateFiles{ca: c.CAFile, cert: c.ClientCertFile, key: c.ClientKeyFile},
		tls:    e.tls,
		logger: logger,
	}
	if e.tls {
		config, digest, err := k.files.read()
		if err != nil {
			return nil, invalid("the certificates cannot be used: %w", err)
		}
		k.config, k.digest, k.readAt = config, digest, time.Now()
	}
	return k, nil
}

// acquire returns the connection for a call. The caller releases it after the call.
func (k *connector) acquire() (*connection, error) {
	k.look()
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.closed {
		return nil, errors.New("the client was closed")
	}
	if k.current == nil {
		service, closeFunc, err := k.dial(k.config)
		if err != nil {
			return nil, err
		}
		k.current = &connection{service: service, close: closeFunc}
	}
	k.current.users++
	return k.current, nil
}

func (k *connector) release(c *connection) {
	k.mu.Lock()
	defer k.mu.Unlock()
	c.users--
	if c.retired && c.users == 0 {
		c.close()
	}
}

// look reads the files again if that is due, and makes calls use a new connection if they have changed.
func (k *connector) look() {
	changed, problem := k.renew()
	if problem != "" {
		k.logger.Warn("the certificates cannot be used, so those read before stay in use", "problem", problem)
	}
	if changed {
		k.logger.Debug("the files of the certificates have changed, so a new connection is made")
		k.changed()
	}
}

// renew reports whether a new connection takes the place of one, and a problem that it has not returned before.
func (k *connector) renew() (changed bool, problem string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if !k.files.any() || time.Since(k.readAt) < lookInterval {
		return false, ""
	}
	k.readAt = time.Now()
	config, digest, err := k.files.read()
	if err != nil {
		if err.Error() == k.problem {
			return false, ""
		}
		k.problem = err.Error()
		return false, k.problem
	}
	k.problem = ""
	if digest == k.digest {
		return false, ""
	}
	k.config, k.digest = config, digest
	retired := k.current
	k.current = nil
	if retired == nil {
		return false, ""
	}
	retired.retired = true
	if retired.users == 0 {
		retired.close()
	}
	return true, ""
}

// close closes the current connection. Those that were retired are closed by the calls that use them, which end when
// the client is closed.
func (k *connector) close() {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.closed = true
	if k.current != nil {
		k.current.close()
		k.current = nil
	}
}

func dial(hosts []string, config *tls.Config) (pb.TokenServiceClient, func(), error) {
	transport := insecure.NewCredentials()
	if config != nil {
		transport = credentials.NewTLS(config)
	}
	conn, err := grpc.NewClient(
		endpointsScheme+":///"+hosts[0],
		grpc.WithResolvers(endpointsBuilder{hosts}),
		grpc.WithTransportCredentials(transport),
		grpc.WithUserAgent("token-broker-client-go/"+Version),
		grpc.WithDefaultServiceConfig(serviceConfig),
		grpc.WithDisableServiceConfig(),
		// The client repeats calls itself: gRPC knows no RetryInfo, and hides the last error at the deadline.
		grpc.WithDisableRetry(),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{
			Time: 20 * time.Second, Timeout: 10 * time.Second, PermitWithoutStream: true,
		}),
		// gRPC's own limit of two minutes would keep a client waiting long after the broker is back.
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff: backoff.Config{
				BaseDelay: 100 * time.Millisecond, Multiplier: 2, Jitter: 0.2, MaxDelay: 2 * time.Second,
			},
			MinConnectTimeout: 5 * time.Second,
		}),
	)
	if err != nil {
		return nil, nil, err
	}
	return pb.NewTokenServiceClient(conn), func() { _ = conn.Close() }, nil
}

// certificateFiles are the names of the files for TLS. Each may be empty.
type certificateFiles struct{ ca, cert, key string }

func (f certificateFiles) any() bool { return f.ca != "" || f.cert != "" }

// read returns the settings for TLS and a digest of the files. It fails if they cannot be used or do not fit together.
func (f certificateFiles) read() (*tls.Config, [sha256.Size]byte, error) {
	config := &tls.Config{MinVersion: tls.VersionTLS12}
	hash := sha256.New()
	var digest [sha256.Size]byte
	if f.ca != "" {
		content, err := readFile(f.ca)
		if err != nil {
			return nil, digest, err
		}
		config.RootCAs = x509.NewCertPool()
		if !config.RootCAs.AppendCertsFromPEM(content) {
			return nil, digest, fmt.Errorf("%s has no certificate in PEM form", shownPath(f.ca))
		}
		fmt.Fprintf(hash, "%d\n%s", len(content), content)
	}
	if f.cert != "" {
		cert, err := readFile(f.cert)
		if err != nil {
			return nil, digest, err
		}
		key, err := readFile(f.key)
		if err != nil {
			return nil, digest, err
		}
		pair, err := tls.X509KeyPair(cert, key)
		if err != nil {
			return nil, digest, fmt.Errorf("%s and %s: %w", shownPath(f.cert), shownPath(f.key), err)
		}
		config.Certificates = []tls.Certificate{pair}
		fmt.Fprintf(hash, "%d\n%s%s", len(cert), cert, key)
	}
	return config, [sha256.Size]byte(hash.Sum(nil)), nil
}
