package tokenbroker

import (
	"context"
	"fmt"
	"runtime"
	"strings"
	"time"
)

// Client keeps the tokens of accounts. A program makes one, and all of its goroutines share it.
type Client struct {
	core *core // does the work; its goroutines do not refer to the Client, so an unused Client is collected
}

// New returns a client. It opens no connection, so it does not fail when the broker is away; it fails with
// [ErrInvalidArgument] when the settings cannot be used.
func New(config Config) (*Client, error) {
	c, err := newCore(config)
	if err != nil {
		return nil, err
	}
	client := &Client{c}
	runtime.AddCleanup(client, (*core).shutDown, c)
	return client, nil
}

// Token returns a token of the account that may be used now. It returns the kept one without a call if that is not due
// for replacement, and otherwise asks the broker, until the context ends; without a deadline, for at most
// [Config.Timeout]. The error is an [*Error].
func (c *Client) Token(ctx context.Context, account string) (*Token, error) {
	defer runtime.KeepAlive(c)
	ctx, cancel := c.core.withTimeout(ctx)
	defer cancel()
	token, err := c.core.token(ctx, account, 0)
	if err != nil {
		return nil, err // not a nil *Error in a non-nil error
	}
	return token, nil
}

// Report tells the broker that the API refused the token of the generation with the code, such as "61003". [Transport]
// does this by itself. The error is an [*Error].
func (c *Client) Report(ctx context.Context, account string, generation uint64, upstreamCode string) (Report, error) {
	defer runtime.KeepAlive(c)
	ctx, cancel := c.core.withTimeout(ctx)
	defer cancel()
	report, err := c.core.report(ctx, account, generation, upstreamCode)
	if err != nil {
		return Report{}, err
	}
	return report, nil
}

// Close ends the watch and the connections. Calls that are waiting, and later ones, fail with [ErrClosed]. It may be
// called again, and always returns nil.
func (c *Client) Close() error {
	c.core.close()
	return nil
}

// String names the endpoints and the number of accounts that have a token.
func (c *Client) String() string {
	return fmt.Sprintf("client of Token Broker at %s with tokens of %d accounts",
		strings.Join(c.core.endpoints.hosts, ", "), c.core.kept())
}

// GoString is the same as String.
func (c *Client) GoString() string { return c.String() }

// Outcome is what the broker does after a report.
type Outcome string

// The outcomes of a report.
const (
	// Reissuing means that a new token is being issued.
	Reissuing Outcome = "REISSUING"
	// AlreadyReplaced means that a later generation already exists.
	AlreadyReplaced Outcome = "ALREADY_REPLACED"
	// TooSoon means that the last token was issued too recently; see [Report.RetryAfter].
	TooSoon Outcome = "TOO_SOON"
	// NotATokenFault means that the code is not about the token, so a new one would not help.
	NotATokenFault Outcome = "NOT_A_TOKEN_FAULT"
)

// Report is the broker's answer to the report of a refused token.
type Report struct {
	Outcome Outcome
	// RetryAfter is how long to wait before another report. It is 0 if there is no need to.
	RetryAfter time.Duration
}
