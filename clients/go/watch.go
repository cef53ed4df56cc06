package tokenbroker

import (
	"context"
	"log/slog"
	"math/rand/v2"
	"time"

	"google.golang.org/grpc/codes"

	pb "github.com/token-broker/token-broker/clients/go/tokenbrokerv1"
)

// watch puts the account on the watch, and starts the watch if it does not run. The caller holds the mutex.
func (c *core) watch(name string, now time.Time) {
	if !c.plan.add(name, now) {
		return
	}
	if !c.watching && !c.closed {
		c.watching = true
		c.tasks.Go(c.runWatch)
	}
	c.lookAtPlan()
}

// lookAtPlan makes the watch look at the plan again.
func (c *core) lookAtPlan() {
	select {
	case c.wake <- struct{}{}:
	default:
	}
}

// runWatch opens streams when the plan says so, and looks at the files of the certificates, until the client is closed.
func (c *core) runWatch() {
	var look <-chan time.Time
	if c.connector.files.any() {
		ticker := time.NewTicker(lookInterval)
		defer ticker.Stop()
		look = ticker.C
	}
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-c.ctx.Done():
			return
		case <-look:
			c.connector.look()
		case <-timer.C:
		case <-c.wake:
		}
		c.mu.Lock()
		now := time.Now()
		due, planned := c.plan.due()
		var line *logLine
		if next := c.plan.next; planned && next != nil && !now.Before(due) {
			line = c.giveUp(next)
			due, planned = c.plan.due()
		}
		if planned && !now.Before(due) {
			if s := c.openStream(now); s != nil {
				c.tasks.Go(func() { c.runStream(s) })
			}
			due, planned = c.plan.due()
		}
		c.mu.Unlock()
		c.log(line)
		timer.Stop()
		if planned {
			timer.Reset(due.Sub(now))
		}
	}
}

// giveUp ends a stream that is not answered, and plans another one. The caller holds the mutex.
func (c *core) giveUp(s *stream) *logLine {
	if s.cancel != nil {
		s.cancel()
	}
	err := &Error{Kind: ErrDeadlineExceeded, Message: "the broker did not answer the watch in time"}
	return c.concludeEnd(s, err, false)
}

// openStream drops the accounts that the program no longer uses, and returns a stream of the others, or nil if there
// are none. The caller holds the mutex.
func (c *core) openStream(now time.Time) *stream {
	for name := range c.plan.members {
		if a := c.accounts[name]; now.Sub(a.usedAt) > unusedAfter {
			c.plan.remove(name)
			a.askSoon(now) // the answer brings it back on the watch
		}
	}
	if len(c.plan.members) == 0 {
		return nil
	}
	return c.plan.open(now)
}

// runStream reads a stream to its end.
func (c *core) runStream(s *stream) {
	ctx, cancel := context.WithCancel(c.ctx)
	defer cancel()
	c.mu.Lock()
	s.cancel = cancel
	c.mu.Unlock()

	bearer := c.bearer.current()
	err := c.readStream(withBearer(ctx, bearer), s)
	if c.ctx.Err() != nil {
		return
	}
	e := errorFromStatus("", err, nil)
	changed := e.Kind == ErrUnauthenticated && c.bearer.changedFrom(bearer)

	c.log(c.streamEnded(s, e, changed))
}

// readStream keeps what the stream brings. It returns an error always, io.EOF if the broker ended the stream.
func (c *core) readStream(ctx context.Context, s *stream) error {
	connection, err := c.connector.acquire()
	if err != nil {
		return err
	}
	defer c.connector.release(connection)
	messages, err := connection.service.WatchTokens(ctx, &pb.WatchTokensRequest{Accounts: s.accounts})
	if err != nil {
		return err
	}
	// Without headers, the stream was refused, and Recv says why.
	if headers, err := messages.Header(); err == nil && headers != nil {
		c.streamAnswered(s)
	}
	for {
		message, err := messages.Recv()
		if err != nil {
			return err
		}
		c.log(c.keep(s, message, time.Now()))
	}
}

// streamAnswered ends the stream that this one replaces.
func (c *core) streamAnswered(s *stream) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if replaced := c.plan.answered(s); replaced != nil && replaced.cancel != nil {
		replaced.cancel()
	}
	c.lookAtPlan()
}

// keep does what a message of a stream says.
func (c *core) keep(s *stream, message *pb.WatchTokensResponse, arrival time.Time) *logLine {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.plan.message(s)
	account := c.accounts[message.GetAccount()]
	if account == nil {
		return nil
	}
	switch event := message.GetEvent().(type) {
	case *pb.WatchTokensResponse_Token:
		token := newToken(account.name, event.Token, arrival)
		if token == nil {
			return &logLine{slog.LevelWarn, "the watch brought an unusable token", []any{"account", account.name}}
		}
		account.offer(token, arrival)
		return &logLine{slog.LevelDebug, "the watch brought a token",
			[]any{"account", account.name, "generation", token.generation}}
	case *pb.WatchTokensResponse_Ended:
		account.forget()
		c.plan.remove(account.name)
		return &logLine{slog.LevelWarn, "the account has ended for this caller",
			[]any{"account", account.name, "reason", event.Ended.GetReason().String()}}
	default:
		return nil
	}
}

// streamEnded draws the conclusions of the end of a stream.
func (c *core) streamEnded(s *stream, err *Error, bearerChanged bool) *logLine {
	c.mu.Lock()
	defer c.mu.Unlock()
	defer c.lookAtPlan()
	return c.concludeEnd(s, err, bearerChanged)
}

// concludeEnd is streamEnded for a caller who holds the mutex.
func (c *core) concludeEnd(s *stream, err *Error, bearerChanged bool) *logLine {
	if !c.plan.ended(s) {
		return nil
	}
	now := time.Now()
	switch err.Code {
	case codes.Unauthenticated:
		if bearerChanged {
			c.plan.reopen(now)
			return nil
		}
		for _, a := range c.accounts {
			a.forget()
		}
		c.plan.reopen(now.Add(pauseUnauthenticated))
		return &logLine{slog.LevelWarn, "the broker no longer knows this caller, so all tokens are forgotten",
			[]any{"message", err.Message}}
	case codes.PermissionDenied, codes.NotFound, codes.InvalidArgument, codes.FailedPrecondition:
		// The refusal does not say which account it is about. The asks will.
		for _, name := range s.accounts {
			c.plan.remove(name)
			if a := c.accounts[name]; a != nil {
				a.askSoon(now)
			}
		}
		c.plan.reopen(now) // for accounts that joined since
		return &logLine{slog.LevelWarn, "the watch was refused", []any{"reason", err.Reason, "message", err.Message}}
	default:
		c.plan.afterEnd(s, err, now, rand.Float64())
		return &logLine{slog.LevelDebug, "the watch ended", []any{"message", err.Message}}
	}
}

// connectionChanged moves the watch to the new connection.
func (c *core) connectionChanged() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.plan.reopen(time.Now())
	c.lookAtPlan()
}
