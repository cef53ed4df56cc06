package tokenbroker

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

// Kind says what went wrong. Each kind is an error that [errors.Is] finds in an [Error].
type Kind string

// The kinds of errors.
const (
	ErrInvalidArgument    Kind = "INVALID_ARGUMENT"    // a name or a setting cannot be used
	ErrUnauthenticated    Kind = "UNAUTHENTICATED"     // the broker does not know this caller's credential
	ErrNotGranted         Kind = "NOT_GRANTED"         // no grant of this caller covers the account
	ErrNoSuchAccount      Kind = "NO_SUCH_ACCOUNT"     // a grant covers the name, but there is no such account
	ErrAccountDisabled    Kind = "ACCOUNT_DISABLED"    // an administrator disabled the account
	ErrCredentialRejected Kind = "CREDENTIAL_REJECTED" // the upstream refuses the account's credential
	ErrEgressRejected     Kind = "EGRESS_REJECTED"     // the upstream refuses the broker's address
	ErrUnavailable        Kind = "UNAVAILABLE"         // the broker, or the upstream, cannot be reached
	ErrOverloaded         Kind = "OVERLOADED"          // the broker sheds load, or the caller's rate is used up
	ErrDeadlineExceeded   Kind = "DEADLINE_EXCEEDED"   // no answer came in time
	ErrCancelled          Kind = "CANCELLED"           // the caller's context was cancelled
	ErrClosed             Kind = "CLOSED"              // the client was closed
	ErrWrongHost          Kind = "WRONG_HOST"          // a request went to another host than that of the API
	ErrInternal           Kind = "INTERNAL"            // anything else
)

// Error returns the kind's name.
func (k Kind) Error() string { return string(k) }

// Temporary reports whether the same call may succeed later without anybody changing anything.
func (k Kind) Temporary() bool {
	switch k {
	case ErrUnavailable, ErrOverloaded, ErrDeadlineExceeded, ErrInternal:
		return true
	default:
		return false
	}
}

// Error is the error of a call of this package. Find it with [errors.As], and its kind with [errors.Is]:
//
//	if errors.Is(err, tokenbroker.ErrNotGranted) { … }
type Error struct {
	// Kind says what went wrong.
	Kind Kind
	// Account is the account's name. It is empty if the error concerns none.
	Account string
	// Code is the gRPC status, or [codes.OK] if there was none.
	Code codes.Code
	// Reason is the reason of the broker's ErrorInfo, such as "CALLER_RATE". It may be empty.
	Reason string
	// Message explains the error to people.
	Message string
	// UpstreamCode is the upstream's code, where the upstream refused the account's credential.
	UpstreamCode string
	// RetryAfter is how long the broker asks to wait. It is 0 if the broker did not say.
	RetryAfter time.Duration

	cause     error
	noRetries bool // the broker sent a negative grpc-retry-pushback-ms
}

// Error describes the error in one line.
func (e *Error) Error() string {
	var b strings.Builder
	b.WriteString("token broker: ")
	if e.Account != "" {
		fmt.Fprintf(&b, "account %s: ", e.Account)
	}
	b.WriteString(string(e.Kind))
	if e.Reason != "" && e.Reason != string(e.Kind) {
		fmt.Fprintf(&b, " (%s)", e.Reason)
	}
	if e.Message != "" {
		b.WriteString(": ")
		b.WriteString(e.Message)
	}
	if e.UpstreamCode != "" {
		fmt.Fprintf(&b, " (upstream code %s)", e.UpstreamCode)
	}
	return b.String()
}

// Is reports whether target is the error's kind.
func (e *Error) Is(target error) bool {
	kind, ok := target.(Kind)
	return ok && kind == e.Kind
}

// Unwrap returns the cause, such as [context.Canceled] or a gRPC status error.
func (e *Error) Unwrap() error { return e.cause }

// Temporary reports whether the same call may succeed later without anybody changing anything.
func (e *Error) Temporary() bool { return e.Kind.Temporary() }

// errorDomain is that of the broker's reasons.
const errorDomain = "token-broker"

// errorFromStatus makes an Error of what a gRPC call returned. The trailer is that of the call.
func errorFromStatus(account string, err error, trailer metadata.MD) *Error {
	s := status.Convert(err)
	e := &Error{Account: account, Code: s.Code(), Message: s.Message(), cause: err}
	for _, detail := range s.Details() {
		switch d := detail.(type) {
		case *errdetails.ErrorInfo:
			if d.GetDomain() != errorDomain {
				continue // it is from something in between
			}
			e.Reason = d.GetReason()
			e.UpstreamCode = d.GetMetadata()["upstream_code"]
		case *errdetails.RetryInfo:
			e.RetryAfter = max(0, d.GetRetryDelay().AsDuration())
		}
	}
	for _, value := range trailer.Get("grpc-retry-pushback-ms") {
		e.noRetries = strings.HasPrefix(value, "-")
	}
	e.Kind = kindOf(e.Code, e.Reason)
	return e
}

// kindOf returns the kind of a status. CANCELLED counts as internal here: a caller that gives up does not end the call,
// so this status comes from the broker or from something in between.
func kindOf(code codes.Code, reason string) Kind {
	switch code {
	case codes.InvalidArgument:
		return ErrInvalidArgument
	case codes.Unauthenticated:
		return ErrUnauthenticated
	case codes.PermissionDenied:
		return ErrNotGranted
	case codes.NotFound:
		return ErrNoSuchAccount
	case codes.FailedPrecondition:
		switch kind := Kind(reason); kind {
		case ErrAccountDisabled, ErrCredentialRejected, ErrEgressRejected:
			return kind
		}
	case codes.Unavailable:
		return ErrUnavailable
	case codes.ResourceExhausted:
		return ErrOverloaded
	case codes.DeadlineExceeded:
		return ErrDeadlineExceeded
	}
	return ErrInternal
}

// errorFromContext makes an Error of a context that has ended.
func errorFromContext(account string, err error) *Error {
	if errors.Is(err, context.Canceled) {
		return &Error{Kind: ErrCancelled, Account: account, Message: "the caller cancelled the call", cause: err}
	}
	return &Error{Kind: ErrDeadlineExceeded, Account: account, Message: "the broker did not answer in time", cause: err}
}

func errClosed(account string) *Error {
	return &Error{Kind: ErrClosed, Account: account, Message: "the client was closed"}
}
