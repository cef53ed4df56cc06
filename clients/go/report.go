package tokenbroker

import (
	"context"
	"math/rand/v2"
	"strings"
	"time"

	"google.golang.org/grpc"

	pb "github.com/token-broker/token-broker/clients/go/tokenbrokerv1"
)

const (
	reportLife      = 5 * time.Second        // how long an outcome stands for those who hold the same generation
	shortestTooSoon = 100 * time.Millisecond // the shortest wait before a report is repeated that came too soon
)

// sharedReport is one report that all share who hold the same generation.
type sharedReport struct {
	generation uint64
	done       chan struct{}

	// Set before done is closed.
	report Report
	err    *Error
	end    time.Time // until then, it stands for further ones
}

// report tells the broker that a token was refused, and repeats that a few times if the broker is away.
func (c *core) report(ctx context.Context, account string, generation uint64, upstreamCode string) (Report, *Error) {
	var last *Error
	for attempt := 0; ; attempt++ {
		answer, err := c.reportOnce(ctx, account, generation, upstreamCode)
		if err == nil {
			return newReport(account, answer)
		}
		last = lastError(last, err)
		pause := pauseAfter(err, attempt, rand.Float64())
		deadline, _ := ctx.Deadline()
		if !err.Temporary() || err.noRetries || attempt+1 == mostReports || time.Now().Add(pause).After(deadline) {
			return Report{}, last
		}
		if c.wait(ctx, pause, nil, nil) == waitEnded {
			return Report{}, lastError(last, errorFromContext(account, ctx.Err()))
		}
	}
}

// newReport returns what the broker answered.
func newReport(account string, answer *pb.ReportRejectedTokenResponse) (Report, *Error) {
	outcome := Outcome(strings.TrimPrefix(answer.GetOutcome().String(), "OUTCOME_"))
	switch outcome {
	case Reissuing, AlreadyReplaced, TooSoon, NotATokenFault:
		return Report{Outcome: outcome, RetryAfter: max(0, answer.GetRetryAfter().AsDuration())}, nil
	default:
		return Report{}, &Error{Kind: ErrInternal, Account: account, Message: "the broker's answer has no known outcome"}
	}
}

func (c *core) reportOnce(ctx context.Context, account string, generation uint64, upstreamCode string) (*pb.ReportRejectedTokenResponse, *Error) {
	var answer *pb.ReportRejectedTokenResponse
	_, err := c.call(ctx, account, func(ctx context.Context, service pb.TokenServiceClient, option grpc.CallOption) (err error) {
		request := &pb.ReportRejectedTokenRequest{Account: account, Generation: generation, UpstreamCode: upstreamCode}
		answer, err = service.ReportRejectedToken(ctx, request, option)
		return err
	})
	return answer, err
}

// lifeOf returns how long an outcome stands. One that came too soon stands until the broker accepts another report.
func lifeOf(report Report) time.Duration {
	if report.Outcome == TooSoon {
		return max(shortestTooSoon, report.RetryAfter)
	}
	return reportLife
}

// reportShared is like report, but callers who hold the same generation share one report, also with those who come
// shortly after it.
func (c *core) reportShared(ctx context.Context, name string, generation uint64, upstreamCode string) (*sharedReport, *Error) {
	c.mu.Lock()
	a := c.account(name)
	shared := a.sharedReport
	if shared == nil || shared.generation != generation || shared.expired(time.Now()) {
		shared = &sharedReport{generation: generation, done: make(chan struct{})}
		a.sharedReport = shared
		deadline, _ := ctx.Deadline()
		if !c.closed {
			c.tasks.Go(func() {
				ctx, cancel := context.WithDeadline(c.ctx, deadline)
				defer cancel()
				shared.report, shared.err = c.report(ctx, name, generation, upstreamCode)
				if shared.err == nil {
					shared.end = time.Now().Add(lifeOf(shared.report))
				}
				close(shared.done)
			})
		}
	}
	c.mu.Unlock()

	select {
	case <-shared.done:
		return shared, shared.err
	case <-c.ctx.Done():
		return nil, errClosed(name)
	case <-ctx.Done():
		return nil, errorFromContext(name, ctx.Err())
	}
}

// expired reports whether the report is finished and no longer stands for others.
func (s *sharedReport) expired(now time.Time) bool {
	select {
	case <-s.done:
		return !now.Before(s.end)
	default:
		return false
	}
}

// replacement reports a refused token, and returns a newer one, or nil if there will be none within the caller's time.
func (c *core) replacement(ctx context.Context, refused *Token, upstreamCode string) *Token {
	deadline, _ := ctx.Deadline()
	for {
		c.mu.Lock()
		account := c.account(refused.account)
		kept, changed := account.kept, account.changed
		usable := account.usable(time.Now(), refused.generation)
		c.mu.Unlock()
		if usable {
			return kept
		}
		shared, err := c.reportShared(ctx, refused.account, refused.generation, upstreamCode)
		if err != nil {
			c.noReplacement(ctx, refused, "a refused token could not be reported", err)
			return nil
		}
		c.logger.Debug("a refused token was reported", "account", refused.account, "generation", refused.generation,
			"code", upstreamCode, "outcome", string(shared.report.Outcome))
		switch shared.report.Outcome {
		case Reissuing, AlreadyReplaced:
			token, err := c.token(ctx, refused.account, refused.generation)
			if err != nil {
				c.noReplacement(ctx, refused, "no newer token could be had", err)
			}
			return token
		case TooSoon:
			// The broker does not keep such a report, so it is repeated.
			if shared.end.After(deadline) || c.wait(ctx, time.Until(shared.end), nil, changed) == waitEnded {
				return nil
			}
		default:
			return nil
		}
	}
}

func (c *core) noReplacement(ctx context.Context, refused *Token, text string, err *Error) {
	c.logger.WarnContext(ctx, text, "account", refused.account, "generation", refused.generation,
		"kind", string(err.Kind), "message", err.Message)
}
