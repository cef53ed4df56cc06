package tokenbroker

import (
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"net/url"
	"os"
	"strconv"
	"strings"
	"time"
)

// DefaultTimeout is how long a call takes at most if its context has no deadline.
const DefaultTimeout = 5 * time.Second

// Config has the settings of a [Client]. It contains no secrets, only the names of files that do.
type Config struct {
	// Endpoints are the broker's URLs, such as https://broker.internal:50051. A host name may stand for several
	// addresses. Calls are spread over all of them. All have the same scheme, http or https.
	Endpoints []string
	// BearerFile has the bearer of this caller. It is read again when it changes.
	BearerFile string
	// CAFile has the certificates that sign the broker's. Without it, the system's are used.
	CAFile string
	// ClientCertFile and ClientKeyFile identify this caller by a certificate. They are read again when they change.
	ClientCertFile, ClientKeyFile string
	// Timeout is how long a call takes at most if its context has no deadline. 0 means [DefaultTimeout].
	Timeout time.Duration
	// AllowPlaintextBearer permits to send the bearer without TLS to other hosts than loopback.
	AllowPlaintextBearer bool
	// Logger gets what the client has to say. nil means [slog.Default].
	Logger *slog.Logger
}

// ConfigFromEnv returns the settings that the environment has in TOKEN_BROKER_ENDPOINT (several are separated by
// commas), TOKEN_BROKER_BEARER_FILE, TOKEN_BROKER_CA_FILE, TOKEN_BROKER_CLIENT_CERT and TOKEN_BROKER_CLIENT_KEY.
func ConfigFromEnv() Config {
	var endpoints []string
	for _, endpoint := range strings.Split(os.Getenv("TOKEN_BROKER_ENDPOINT"), ",") {
		if endpoint = strings.TrimSpace(endpoint); endpoint != "" {
			endpoints = append(endpoints, endpoint)
		}
	}
	return Config{
		Endpoints:      endpoints,
		BearerFile:     os.Getenv("TOKEN_BROKER_BEARER_FILE"),
		CAFile:         os.Getenv("TOKEN_BROKER_CA_FILE"),
		ClientCertFile: os.Getenv("TOKEN_BROKER_CLIENT_CERT"),
		ClientKeyFile:  os.Getenv("TOKEN_BROKER_CLIENT_KEY"),
	}
}

// String describes the settings. It shows a path only if it leads somewhere, because a bearer or a key may have been given
// instead of one, and no endpoint, because somebody may have put a password into it.
func (c Config) String() string {
	return fmt.Sprintf("settings with %d endpoints, bearer file %q, CA file %q, client certificate %q, client key %q",
		len(c.Endpoints), shownPath(c.BearerFile), shownPath(c.CAFile), shownPath(c.ClientCertFile),
		shownPath(c.ClientKeyFile))
}

// Format writes the same as String for each verb.
func (c Config) Format(s fmt.State, _ rune) { _, _ = io.WriteString(s, c.String()) }

// LogValue describes the settings as String does.
func (c Config) LogValue() slog.Value { return slog.StringValue(c.String()) }

// MarshalJSON writes the text that String returns, because many loggers print a value as JSON.
func (c Config) MarshalJSON() ([]byte, error) { return json.Marshal(c.String()) }

// endpoints are the parsed Endpoints of a Config.
type endpoints struct {
	tls   bool
	hosts []string // host:port
}

func invalid(format string, args ...any) *Error {
	err := fmt.Errorf(format, args...)
	return &Error{Kind: ErrInvalidArgument, Message: err.Error(), cause: err}
}

// check returns the endpoints, or says which settings cannot be used. It quotes no endpoint that it could not parse,
// because somebody may have put a password into it.
func (c *Config) check() (*endpoints, *Error) {
	if len(c.Endpoints) == 0 {
		return nil, invalid("no endpoint is set: set Endpoints or TOKEN_BROKER_ENDPOINT")
	}
	parsed := &endpoints{}
	for i, text := range c.Endpoints {
		u, err := url.Parse(text)
		if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Hostname() == "" || !isPort(u.Port()) ||
			u.User != nil || strings.Trim(u.Path, "/") != "" || u.RawQuery != "" || u.Fragment != "" {
			return nil, invalid("endpoint %d is not of the form http://host:port or https://host:port", i+1)
		}
		tls := u.Scheme == "https"
		if i > 0 && tls != parsed.tls {
			return nil, invalid("the endpoints mix http and https")
		}
		if !tls && c.BearerFile != "" && !c.AllowPlaintextBearer && !isLoopback(u.Hostname()) {
			return nil, invalid("the bearer would go to %s without TLS: use https, or set AllowPlaintextBearer", u.Host)
		}
		parsed.tls = tls
		parsed.hosts = append(parsed.hosts, net.JoinHostPort(u.Hostname(), u.Port()))
	}
	if (c.ClientCertFile == "") != (c.ClientKeyFile == "") {
		return nil, invalid("a client certificate needs both ClientCertFile and ClientKeyFile")
	}
	if !parsed.tls && (c.CAFile != "" || c.ClientCertFile != "") {
		return nil, invalid("certificates are set, but the endpoints are http")
	}
	if c.Timeout < 0 {
		return nil, invalid("the timeout is negative")
	}
	return parsed, nil
}

func isPort(text string) bool {
	port, err := strconv.ParseUint(text, 10, 16)
	return err == nil && port != 0
}

func isLoopback(host string) bool {
	if strings.EqualFold(host, "localhost") {
		return true
	}
	address, err := netip.ParseAddr(host)
	return err == nil && address.IsLoopback()
}
