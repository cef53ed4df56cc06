// Command conformance drives the Go client for the scenarios in clients/conformance, over standard input and output.
package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc/codes"

	tokenbroker "github.com/token-broker/token-broker/clients/go"
)

// request has the keys of all operations.
type request struct {
	ID            json.RawMessage `json:"id"`
	Op            string          `json:"op"`
	Client        string          `json:"client"`
	Endpoints     []string        `json:"endpoints"`
	BearerFile    string          `json:"bearer_file"`
	CAFile        string          `json:"ca_file"`
	ClientCert    string          `json:"client_cert"`
	ClientKey     string          `json:"client_key"`
	TimeoutMillis int64           `json:"timeout_ms"`
	Account       string          `json:"account"`
	Threads       int             `json:"threads"`
	Request       json.RawMessage `json:"request"`
	Generation    json.RawMessage `json:"generation"` // text, or a number
	UpstreamCode  string          `json:"upstream_code"`
	Adapter       string          `json:"adapter"`
	Method        string          `json:"method"`
	URL           string          `json:"url"`
	Body          *string         `json:"body"`
	StopAfter     int64           `json:"stop_after_ms"`
}

type object = map[string]any

// opened is a client with what `show` prints of it.
type opened struct {
	client *tokenbroker.Client
	config tokenbroker.Config

	mu        sync.Mutex
	lastToken *tokenbroker.Token
	lastError error
}

type driver struct {
	mu      sync.Mutex
	clients map[string]*opened
	cancels map[string]context.CancelFunc // by the id of the request

	output sync.Mutex
}

func main() {
	slog.SetDefault(slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelDebug})))
	d := &driver{clients: make(map[string]*opened), cancels: make(map[string]context.CancelFunc)}
	if err := d.serve(os.Stdin); err != nil {
		fmt.Fprintln(os.Stderr, "conformance:", err)
		os.Exit(1)
	}
}

// serve answers the requests until the input ends.
func (d *driver) serve(input io.Reader) error {
	scanner := bufio.NewScanner(input)
	scanner.Buffer(nil, 16<<20)
	var running sync.WaitGroup
	for scanner.Scan() {
		if len(scanner.Bytes()) == 0 {
			continue
		}
		var r request
		if err := json.Unmarshal(scanner.Bytes(), &r); err != nil {
			return err
		}
		// Registered before the next line is read, so that a `cancel` finds it.
		ctx, cancel := context.WithCancel(context.Background())
		d.mu.Lock()
		d.cancels[string(r.ID)] = cancel
		d.mu.Unlock()
		if r.Op == "open" || r.Op == "close" {
			d.answer(ctx, r) // in the order of the input
			continue
		}
		running.Go(func() { d.answer(ctx, r) })
	}
	d.mu.Lock()
	for _, o := range d.clients {
		_ = o.client.Close()
	}
	d.mu.Unlock()
	running.Wait()
	return scanner.Err()
}

func (d *driver) answer(ctx context.Context, r request) {
	ok, err := d.do(ctx, r)
	answer := object{"id": r.ID}
	if err != nil {
		answer["error"] = errorObject(err)
	} else {
		answer["ok"] = ok
	}
	d.mu.Lock()
	d.cancels[string(r.ID)]()
	delete(d.cancels, string(r.ID))
	d.mu.Unlock()

	d.output.Lock()
	defer d.output.Unlock()
	if err := json.NewEncoder(os.Stdout).Encode(answer); err != nil {
		fmt.Fprintln(os.Stderr, "conformance:", err)
	}
}

func (d *driver) do(ctx context.Context, r request) (any, error) {
	switch r.Op {
	case "hello":
		return object{"language": "go", "adapters": []string{"net/http"}}, nil
	case "open":
		return object{}, d.open(r)
	case "cancel":
		d.mu.Lock()
		defer d.mu.Unlock()
		if cancel := d.cancels[string(r.Request)]; cancel != nil {
			cancel()
		}
		return object{}, nil
	}
	d.mu.Lock()
	o := d.clients[r.Client]
	d.mu.Unlock()
	if o == nil {
		return nil, &tokenbroker.Error{Kind: tokenbroker.ErrInvalidArgument, Message: "no such client is open"}
	}
	if r.TimeoutMillis > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, time.Duration(r.TimeoutMillis)*time.Millisecond)
		defer cancel()
	}
	switch r.Op {
	case "token":
		return o.token(ctx, r.Account)
	case "tokens":
		return o.tokens(ctx, r.Account, r.Threads), nil
	case "report":
		return o.report(ctx, r)
	case "api":
		return o.api(ctx, r)
	case "load":
		return o.load(ctx, r)
	case "show":
		return o.show(), nil
	case "close":
		return object{}, o.client.Close()
	default:
		return nil, fmt.Errorf("unknown operation %q", r.Op)
	}
}

func (d *driver) open(r request) error {
	config := tokenbroker.Config{
		Endpoints:      r.Endpoints,
		BearerFile:     r.BearerFile,
		CAFile:         r.CAFile,
		ClientCertFile: r.ClientCert,
		ClientKeyFile:  r.ClientKey,
		Timeout:        time.Duration(r.TimeoutMillis) * time.Millisecond,
	}
	client, err := tokenbroker.New(config)
	if err != nil {
		return err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.clients[r.Client] = &opened{client: client, config: config}
	return nil
}

// tokenOf gets a token, and notes the outcome for `show`.
func (o *opened) tokenOf(ctx context.Context, account string) (*tokenbroker.Token, error) {
	token, err := o.client.Token(ctx, account)
	o.mu.Lock()
	defer o.mu.Unlock()
	if err != nil {
		o.lastError = err
	} else {
		o.lastToken = token
	}
	return token, err
}

func (o *opened) token(ctx context.Context, account string) (any, error) {
	token, err := o.tokenOf(ctx, account)
	if err != nil {
		return nil, err
	}
	return tokenObject(token), nil
}

func (o *opened) tokens(ctx context.Context, account string, threads int) any {
	results := make([]any, threads)
	start := make(chan struct{})
	var running sync.WaitGroup
	for i := range results {
		running.Go(func() {
			<-start
			token, err := o.tokenOf(ctx, account)
			if err != nil {
				results[i] = object{"error": errorObject(err)}
			} else {
				results[i] = tokenObject(token)
			}
		})
	}
	close(start)
	running.Wait()
	return object{"results": results}
}

func (o *opened) report(ctx context.Context, r request) (any, error) {
	generation, err := strconv.ParseUint(strings.Trim(string(r.Generation), `"`), 10, 64)
	if err != nil {
		return nil, err
	}
	report, err := o.client.Report(ctx, r.Account, generation, r.UpstreamCode)
	if err != nil {
		return nil, err
	}
	return object{"outcome": report.Outcome, "retry_after_ms": report.RetryAfter.Milliseconds()}, nil
}

func (o *opened) api(ctx context.Context, r request) (any, error) {
	var body io.Reader
	if r.Body != nil {
		body = strings.NewReader(*r.Body)
	}
	method := r.Method
	if method == "" {
		method = http.MethodGet
	}
	request, err := http.NewRequestWithContext(ctx, method, r.URL, body)
	if err != nil {
		return nil, err
	}
	client := &http.Client{Transport: &tokenbroker.Transport{Client: o.client, Account: r.Account}}
	response, err := client.Do(request)
	if err != nil {
		return nil, err
	}
	defer func() { _ = response.Body.Close() }()
	text, err := io.ReadAll(response.Body)
	if err != nil {
		return nil, err
	}
	return object{"status": response.StatusCode, "body": string(text)}, nil
}

func (o *opened) load(ctx context.Context, r request) (any, error) {
	var (
		mu          sync.Mutex
		calls       int
		kinds       = make(map[string]int)
		generations = make(map[string]bool)
		running     sync.WaitGroup
	)
	stop := time.Now().Add(time.Duration(r.StopAfter) * time.Millisecond)
	for range r.Threads {
		running.Go(func() {
			for time.Now().Before(stop) && ctx.Err() == nil {
				token, err := o.tokenOf(ctx, r.Account)
				mu.Lock()
				calls++
				if err != nil {
					kinds[errorObject(err)["kind"].(string)]++
				} else {
					generations[strconv.FormatUint(token.Generation(), 10)] = true
				}
				mu.Unlock()
				time.Sleep(time.Millisecond) // a program does something with its tokens
			}
		})
	}
	running.Wait()
	seen := make([]string, 0, len(generations))
	for generation := range generations {
		seen = append(seen, generation)
	}
	slices.Sort(seen)
	return object{"calls": calls, "errors": kinds, "generations": seen}, nil
}

// show prints everything in all the ways in which Go prints.
func (o *opened) show() any {
	o.mu.Lock()
	defer o.mu.Unlock()
	var b strings.Builder
	for _, value := range []any{o.client, o.config, o.lastToken, o.lastError} {
		if value == nil || value == (*tokenbroker.Token)(nil) {
			continue
		}
		fmt.Fprintf(&b, "%v\n%+v\n%#v\n%s\n", value, value, value, value)
		slog.New(slog.NewJSONHandler(&b, nil)).Info("value", "value", value)
		if text, err := json.Marshal(value); err == nil {
			fmt.Fprintf(&b, "%s\n", text)
		}
	}
	fmt.Fprintf(&b, "%v\n%+v\n", struct{ t *tokenbroker.Token }{o.lastToken}, struct{ c *tokenbroker.Client }{o.client})
	if o.lastToken != nil {
		fmt.Fprintf(&b, "%v\n%+v\n%#v\n", struct{ t tokenbroker.Token }{*o.lastToken}, *o.lastToken, *o.lastToken)
	}
	return object{"text": b.String()}
}

func tokenObject(t *tokenbroker.Token) object {
	return object{
		"token":         t.AccessToken(),
		"generation":    strconv.FormatUint(t.Generation(), 10),
		"allowed_ip":    t.AllowedIP(),
		"api_base_url":  t.APIBaseURL(),
		"expires_in_ms": t.ExpiresIn().Milliseconds(),
	}
}

func errorObject(err error) object {
	e := &tokenbroker.Error{Kind: tokenbroker.ErrInternal, Message: err.Error()}
	errors.As(err, &e)
	answer := object{"kind": string(e.Kind), "message": e.Message}
	if e.Code != codes.OK {
		answer["code"] = codeName(e.Code)
	}
	if e.Reason != "" {
		answer["reason"] = e.Reason
	}
	if e.UpstreamCode != "" {
		answer["upstream_code"] = e.UpstreamCode
	}
	if e.RetryAfter > 0 {
		answer["retry_after_ms"] = e.RetryAfter.Milliseconds()
	}
	return answer
}

// codeName returns the name of a status as other languages write it.
func codeName(code codes.Code) string {
	for name, value := range map[string]codes.Code{
		"CANCELLED": codes.Canceled, "UNKNOWN": codes.Unknown, "INVALID_ARGUMENT": codes.InvalidArgument,
		"DEADLINE_EXCEEDED": codes.DeadlineExceeded, "NOT_FOUND": codes.NotFound, "ALREADY_EXISTS": codes.AlreadyExists,
		"PERMISSION_DENIED": codes.PermissionDenied, "RESOURCE_EXHAUSTED": codes.ResourceExhausted,
		"FAILED_PRECONDITION": codes.FailedPrecondition, "ABORTED": codes.Aborted, "OUT_OF_RANGE": codes.OutOfRange,
		"UNIMPLEMENTED": codes.Unimplemented, "INTERNAL": codes.Internal, "UNAVAILABLE": codes.Unavailable,
		"DATA_LOSS": codes.DataLoss, "UNAUTHENTICATED": codes.Unauthenticated,
	} {
		if value == code {
			return name
		}
	}
	return code.String()
}
