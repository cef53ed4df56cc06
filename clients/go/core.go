package tokenbroker

import (
	"context"
	"errors"
	"log/slog"
	"math"
	"math/rand/v2"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"

	pb "github.com/token-broker/token-broker/clients/go/tokenbrokerv1"
)

const (
	mostReports  = 4                      // attempts to deliver a report, as many as the service config has
	mostUnused   = 100                    // so many accounts are known before unused ones are looked for
	longestClose = 900 * time.Millisecond // how long a close waits for goroutines
)

// core is a client without the handle that the program has.
type core struct {
	endpoints *endpoints
	timeout   time.Duration
	bearer    *bearerFile
	connector *connector
	logger    *slog.Logger

	ctx    context.Context // ends when the client is closed
	cancel context.CancelFunc
	tasks  sync.WaitGroup // the goroutines of the client
	wake   chan struct{}  // has room for one; makes the watch look at the plan

	mu       sync.Mutex
	accounts map[string]*account
	pruneAt  int // how many accounts are known when unused ones are looked for
	plan     plan
	watching bool // the goroutine of the watch was started
	closed   bool
}

func newCore(config Config) (*core, *Error) {
	endpoints, err := config.check()
	if err != nil {
		return nil, err
	}
	logger := config.Logger
	if logger == nil {
		logger = slog.Default()
	}
	logger = logger.With("component", "token-broker")
	bearer, err := newBearerFile(config.BearerFile, logger)
	if err != nil {
		return nil, err
	}
	connector, err := newConnector(&config, endpoints, logger)
	if err != nil {
		return nil, err
	}
	c := &core{
		endpoints: endpoints,
		timeout:   config.Timeout,
		bearer:    bearer,
		connector: connector,
		logger:    logger,
		wake:      make(chan struct{}, 1),
		accounts:  make(map[string]*account),
		pruneAt:   mostUnused,
		plan:      newPlan(),
	}
	if c.timeout == 0 {
		c.timeout = DefaultTimeout
	}
	c.ctx, c.cancel = context.WithCancel(context.Background())
	connector.changed = c.connectionChanged
	return c, nil
}

func (c *core) withTimeout(ctx context.Context) (context.Context, context.CancelFunc) {
	if _, ok := ctx.Deadline(); ok {
		return context.WithCancel(ctx)
	}
	return context.WithTimeout(ctx, c.timeout)
}

// account returns what is known about the account. The caller holds the mutex.
func (c *core) account(name string) *account {
	a := c.accounts[name]
	if a == nil {
		if len(c.accounts) >= c.pruneAt {
			c.prune(time.Now())
		}
		a = &account{name: name, changed: make(chan struct{})}
		c.accounts[name] = a
	}
	return a
}

// prune forgets accounts about which nothing need be known, because names may come from the program's users. Twice as
// many as are left may be known before it is done again, so that it costs little per account. The caller holds the mutex.
func (c *core) prune(now time.Time) {
	for name, a := range c.accounts {
		if _, watched := c.plan.members[name]; !watched && a.unused(now) {
			delete(c.accounts, name)
		}
	}
	c.pruneAt = max(mostUnused, 2*len(c.accounts))
}

// token returns a token of a later generation than the given one. The context has a deadline.
func (c *core) token(ctx context.Context, name string, newerThan uint64) (*Token, *Error) {
	deadline, _ := ctx.Deadline()
	var failed *ask // the newest ask whose failure this caller has seen
	var last *Error // why no token could be had yet
	attempts := 0
	for {
		c.mu.Lock()
		if c.closed {
			c.mu.Unlock()
			return nil, errClosed(name)
		}
		now := time.Now()
		account := c.account(name)
		account.usedAt = now
		kept, changed, refusal := account.kept, account.changed, account.refusal
		decision := account.decide(now, newerThan)
		var a *ask
		if (decision == decideAsk || decision == decideAskOrUse) && ctx.Err() == nil {
			a = c.join(account, newerThan, failed, attempts, deadline)
		}
		c.mu.Unlock()

		switch {
		case decision == decideUse:
			return kept, nil
		case decision == decideRefuse:
			return nil, refusal
		case a == nil:
			return c.outOfTime(ctx, account, newerThan, last)
		}
		limit := forever
		if decision == decideAskOrUse {
			limit = longestWaitForReplacement
		}
		switch c.wait(ctx, limit, a.done, changed) {
		case waitEnded:
			return c.outOfTime(ctx, account, newerThan, last)
		case waitElapsed:
			c.tookTooLong(account)
			continue // a pause has begun, in which the kept token is used
		case waitDone:
			if !a.finished() {
				continue // a token was pushed, or the client was closed
			}
		}
		if a.err == nil {
			return a.token, nil
		}
		if !a.err.Temporary() {
			return nil, a.err
		}
		if decision == decideAskOrUse {
			continue // a pause has begun, in which the kept token is used
		}
		last = lastError(last, a.err)
		failed, attempts = a, a.attempt+1
		if a.deadline.Before(deadline) && !time.Now().Before(a.deadline) {
			continue // the caller who caused the ask had less time
		}
		if a.err.noRetries || a.retryAt.After(deadline) {
			return nil, last
		}
		if c.wait(ctx, time.Until(a.retryAt), nil, changed) == waitEnded {
			return c.outOfTime(ctx, account, newerThan, last)
		}
	}
}

// outOfTime returns what a caller gets whose context has ended: a kept token if there is one, unless the caller
// cancelled.
func (c *core) outOfTime(ctx context.Context, a *account, newerThan uint64, last *Error) (*Token, *Error) {
	err := errorFromContext(a.name, ctx.Err())
	if err.Kind == ErrCancelled {
		return nil, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if a.usable(time.Now(), newerThan) {
		return a.kept, nil
	}
	return nil, lastError(last, err)
}

// lastError returns the error to report after another one. What happened first says more than that time ran out after
// it. A cancellation is always reported.
func lastError(before, now *Error) *Error {
	if before != nil && now.Kind == ErrDeadlineExceeded {
		return before
	}
	return now
}

type waitResult int

const (
	waitDone    waitResult = iota // a channel was closed, or the client was
	waitElapsed                   // the time has passed
	waitEnded                     // the caller's context has ended
)

// forever is a limit that is never reached.
const forever = time.Duration(math.MaxInt64)

// wait waits for one of the channels, which may be nil, and for no longer than the limit.
func (c *core) wait(ctx context.Context, limit time.Duration, done, changed <-chan struct{}) waitResult {
	timer := time.NewTimer(limit)
	defer timer.Stop()
	select {
	case <-done:
		return waitDone
	case <-changed:
		return waitDone
	case <-c.ctx.Done():
		return waitDone
	case <-timer.C:
		return waitElapsed
	case <-ctx.Done():
		return waitEnded
	}
}

// tookTooLong counts an ask that is not answered in time as failed, for callers who have a usable token.
func (c *core) tookTooLong(a *account) {
	c.mu.Lock()
	begun := a.failed(time.Now(), rand.Float64())
	c.mu.Unlock()
	if begun {
		c.logger.Warn("the broker is slow, so the kept token is used", "account", a.name)
	}
}

// join returns the ask to wait for, and starts one if there is none. A caller who has seen the failure of an ask takes
// the failure of any later one, so that the callers who waited together do not ask one after another. The caller holds
// the mutex.
func (c *core) join(a *account, newerThan uint64, failed *ask, attempts int, deadline time.Time) *ask {
	slot := &a.ask
	if newerThan > 0 {
		slot = &a.newerAsk
	}
	if newest := *slot; newest != nil && newest != failed && newest.newerThan >= newerThan {
		if !newest.finished() || failed != nil && newest.err != nil {
			return newest
		}
	}
	started := &ask{newerThan: newerThan, attempt: attempts, deadline: deadline, done: make(chan struct{})}
	*slot = started
	c.tasks.Go(func() { c.run(a, started) })
	return started
}

// run makes the call of an ask, and hands its outcome to all who wait for it.
func (c *core) run(account *account, a *ask) {
	ctx, cancel := context.WithDeadline(c.ctx, a.deadline)
	defer cancel()
	var answer *pb.GetTokenResponse
	sent, err := c.call(ctx, account.name, func(ctx context.Context, service pb.TokenServiceClient, option grpc.CallOption) (err error) {
		request := &pb.GetTokenRequest{Account: account.name, NewerThanGeneration: a.newerThan}
		answer, err = service.GetToken(ctx, request, option)
		return err
	})
	var token *Token
	if err == nil {
		token = newToken(account.name, answer, sent)
		switch {
		case token == nil:
			err = &Error{Kind: ErrInternal, Account: account.name, Message: "the broker's answer has no usable token"}
		case token.ended(time.Now()):
			err = &Error{Kind: ErrInternal, Account: account.name, Message: "the broker's token is about to end"}
		case token.generation <= a.newerThan:
			err = &Error{Kind: ErrInternal, Account: account.name, Message: "the broker's answer has an older token"}
		}
	}

	c.log(c.finish(account, a, token, err))
}

// finish draws the conclusions of the outcome of an ask.
func (c *core) finish(account *account, a *ask, token *Token, err *Error) *logLine {
	c.mu.Lock()
	defer c.mu.Unlock()
	defer close(a.done)
	now := time.Now()
	if err == nil {
		a.token = account.offer(token, now)
		c.watch(account.name, now)
		return &logLine{slog.LevelDebug, "the broker answered with a token",
			[]any{"account", account.name, "generation", token.generation}}
	}
	a.err = err
	level := slog.LevelDebug // the callers get the error
	switch {
	case err.Kind == ErrClosed:
		return nil
	case !err.Temporary():
		account.refused(err, now)
	default:
		a.retryAt = now.Add(pauseAfter(err, a.attempt, rand.Float64()))
		if account.usable(now, 0) {
			account.failed(now, rand.Float64())
			level = slog.LevelWarn // the callers get the kept token
		}
	}
	return &logLine{level, "asking for a token failed", []any{"account", account.name,
		"kind", string(err.Kind), "reason", err.Reason, "message", err.Message}}
}

// logLine is a line to be logged when the mutex is free, because a handler of logs may use the client.
type logLine struct {
	level slog.Level
	text  string
	args  []any
}

// log logs the line, if there is one.
func (c *core) log(line *logLine) {
	if line != nil {
		c.logger.Log(context.Background(), line.level, line.text, line.args...)
	}
}

// call makes one call, and returns when it was sent. If the broker does not know the bearer, and the file has another
// one, the call is repeated once with that.
func (c *core) call(
	ctx context.Context, account string, do func(context.Context, pb.TokenServiceClient, grpc.CallOption) error,
) (sent time.Time, _ *Error) {
	connection, err := c.connector.acquire()
	if err != nil {
		return sent, c.errorOf(ctx, account, err, nil)
	}
	defer c.connector.release(connection)
	for repeated := false; ; repeated = true {
		bearer := c.bearer.current()
		var trailer metadata.MD
		sent = time.Now()
		err = do(withBearer(ctx, bearer), connection.service, grpc.Trailer(&trailer))
		if err == nil {
			return sent, nil
		}
		e := c.errorOf(ctx, account, err, trailer)
		if e.Kind != ErrUnauthenticated || repeated || !c.bearer.changedFrom(bearer) {
			return sent, e
		}
	}
}

// errorOf makes an Error of a failed call. It tells cancellations of the client's side from the broker's errors.
func (c *core) errorOf(ctx context.Context, account string, err error, trailer metadata.MD) *Error {
	e := errorFromStatus(account, err, trailer)
	switch {
	case c.ctx.Err() != nil:
		return errClosed(account)
	case e.Code == codes.Canceled && errors.Is(ctx.Err(), context.Canceled):
		return errorFromContext(account, ctx.Err())
	default:
		return e
	}
}

func withBearer(ctx context.Context, bearer string) context.Context {
	if bearer == "" {
		return ctx
	}
	return metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+bearer)
}

func (c *core) kept() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	kept := 0
	for _, a := range c.accounts {
		if a.kept != nil {
			kept++
		}
	}
	return kept
}

// shutDown ends everything, and waits for nothing.
func (c *core) shutDown() {
	c.mu.Lock()
	c.closed = true
	c.mu.Unlock()
	c.cancel()
	c.connector.close()
}

// close ends everything, and waits for the goroutines, unless one of them hangs in a read of a file.
func (c *core) close() {
	c.shutDown()
	ended := make(chan struct{})
	go func() {
		c.tasks.Wait()
		close(ended)
	}()
	timer := time.NewTimer(longestClose)
	defer timer.Stop()
	select {
	case <-ended:
	case <-timer.C:
	}
}
