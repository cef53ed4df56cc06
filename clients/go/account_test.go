package tokenbroker

import (
	"context"
	"errors"
	"testing"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	pb "github.com/token-broker/token-broker/clients/go/tokenbrokerv1"
)

func TestAKeptTokenIsUsedUntilItsReuseEndAndAskedForAfterwards(t *testing.T) {
	arrival := time.Now()
	kept := newToken("a", answer(7), arrival)
	for _, c := range []struct {
		name      string
		account   account
		after     time.Duration
		newerThan uint64
		expected  decision
	}{
		{"nothing is kept", account{}, 0, 0, decideAsk},
		{"just arrived", account{kept: kept}, 0, 0, decideUse},
		{"just before the reuse end", account{kept: kept}, time.Minute - 1, 0, decideUse},
		{"at the reuse end", account{kept: kept}, time.Minute, 0, decideAskOrUse},
		{"in a pause", account{kept: kept, pauseEnd: arrival.Add(80 * time.Second)}, 80*time.Second - 1, 0, decideUse},
		{"after a pause", account{kept: kept, pauseEnd: arrival.Add(80 * time.Second)}, 80 * time.Second, 0, decideAskOrUse},
		{"just before the last second", account{kept: kept}, 119*time.Second - 1, 0, decideAskOrUse},
		{"in the last second", account{kept: kept}, 119 * time.Second, 0, decideAsk},
		{"in the last second of a pause", account{kept: kept, pauseEnd: arrival.Add(time.Hour)}, 119 * time.Second, 0, decideAsk},
		{"the kept one was refused", account{kept: kept}, 0, 7, decideAsk},
		{"an older one was refused", account{kept: kept}, 0, 6, decideUse},
		{"a refusal is remembered", account{refusalEnd: arrival.Add(refusalLife)}, refusalLife - 1, 0, decideRefuse},
		{"a refusal is over", account{refusalEnd: arrival.Add(refusalLife)}, refusalLife, 0, decideAsk},
	} {
		if actual := c.account.decide(arrival.Add(c.after), c.newerThan); actual != c.expected {
			t.Errorf("%s: decision %d, expected %d", c.name, actual, c.expected)
		}
	}
}

func TestTheNewestTokenWins(t *testing.T) {
	now := time.Now()
	kept := newToken("a", answer(7), now)
	other := answer(7)
	other.AccessToken = "another"
	for _, c := range []struct {
		name     string
		offered  *Token
		kept     *Token
		at       time.Duration
		expected bool
	}{
		{"where nothing is kept", newToken("a", answer(1), now), nil, 0, true},
		{"of a larger generation", newToken("a", answer(8), now), kept, 0, true},
		{"of an older generation", newToken("a", answer(6), now.Add(time.Second)), kept, 0, false},
		{"the same with a later reuse end", newToken("a", answer(7), now.Add(time.Second)), kept, 0, true},
		{"the same with an earlier reuse end", newToken("a", answer(7), now.Add(-time.Second)), kept, 0, false},
		{"another of the same generation", newToken("a", other, now.Add(time.Second)), kept, 0, false},
		{"of an older generation where the kept one has ended", newToken("a", answer(6), now.Add(time.Hour)), kept, time.Hour, true},
	} {
		if actual := c.offered.replaces(c.kept, now.Add(c.at)); actual != c.expected {
			t.Errorf("%s: %t", c.name, actual)
		}
	}
}

func TestAnAnswerThatCannotBeUsedIsNoToken(t *testing.T) {
	for name, spoil := range map[string]func(*pb.GetTokenResponse){
		"no token":       func(a *pb.GetTokenResponse) { a.AccessToken = "" },
		"no reuse_for":   func(a *pb.GetTokenResponse) { a.ReuseFor = nil },
		"no expires_in":  func(a *pb.GetTokenResponse) { a.ExpiresIn = nil },
		"zero reuse_for": func(a *pb.GetTokenResponse) { a.ReuseFor.Seconds = 0 },
		"negative life":  func(a *pb.GetTokenResponse) { a.ExpiresIn.Seconds = -1 },
	} {
		a := answer(1)
		spoil(a)
		if newToken("a", a, time.Now()) != nil {
			t.Errorf("%s: a token was made", name)
		}
	}
}

func TestPausesGrowToTheirLimitAndAreShortenedByUpToHalf(t *testing.T) {
	for _, c := range []struct {
		failures int
		random   float64
		expected time.Duration
	}{
		{0, 0, 100 * time.Millisecond},
		{0, 0.5, 75 * time.Millisecond},
		{1, 0, 200 * time.Millisecond},
		{3, 0, 800 * time.Millisecond},
		{4, 0, time.Second},
		{4, 0.9999999, 500 * time.Millisecond},
		{1 << 40, 0, time.Second},
	} {
		actual := growingPause(firstPauseWithoutToken, longestPauseWithoutToken, c.failures, c.random)
		if (actual - c.expected).Abs() > time.Millisecond {
			t.Errorf("after %d failures with %f: %s, expected %s", c.failures, c.random, actual, c.expected)
		}
	}
}

func TestThePauseThatTheBrokerAsksForCounts(t *testing.T) {
	if pause := pauseAfter(&Error{RetryAfter: 3 * time.Second}, 0, 0.7); pause != 3*time.Second {
		t.Errorf("%s", pause)
	}
}

func TestAFailureInAPauseChangesNothing(t *testing.T) {
	now := time.Now()
	var a account
	if !a.failed(now, 0) || a.pauseEnd != now.Add(time.Second) {
		t.Fatalf("%+v", a)
	}
	if a.failed(now.Add(999*time.Millisecond), 0) || a.pauseEnd != now.Add(time.Second) {
		t.Fatalf("%+v", a)
	}
	if !a.failed(now.Add(time.Second), 0) || a.pauseEnd != now.Add(3*time.Second) {
		t.Fatalf("%+v", a)
	}
}

func TestEachStatusHasItsKind(t *testing.T) {
	temporary := map[Kind]bool{ErrUnavailable: true, ErrOverloaded: true, ErrDeadlineExceeded: true, ErrInternal: true}
	for _, c := range []struct {
		code   codes.Code
		reason string
		kind   Kind
	}{
		{codes.InvalidArgument, "", ErrInvalidArgument},
		{codes.Unauthenticated, "CREDENTIAL_REFUSED", ErrUnauthenticated},
		{codes.PermissionDenied, "NOT_GRANTED", ErrNotGranted},
		{codes.NotFound, "NO_SUCH_ACCOUNT", ErrNoSuchAccount},
		{codes.FailedPrecondition, "ACCOUNT_DISABLED", ErrAccountDisabled},
		{codes.FailedPrecondition, "CREDENTIAL_REJECTED", ErrCredentialRejected},
		{codes.FailedPrecondition, "EGRESS_REJECTED", ErrEgressRejected},
		{codes.FailedPrecondition, "SOMETHING_NEW", ErrInternal},
		{codes.Unavailable, "UPSTREAM_UNAVAILABLE", ErrUnavailable},
		{codes.ResourceExhausted, "CALLER_RATE", ErrOverloaded},
		{codes.DeadlineExceeded, "", ErrDeadlineExceeded},
		{codes.Canceled, "", ErrInternal},
		{codes.Unknown, "", ErrInternal},
		{codes.Internal, "", ErrInternal},
	} {
		e := errorFromStatus("a", refusal(c.code, c.reason, time.Second), nil)
		if e.Kind != c.kind || e.Reason != c.reason || e.RetryAfter != time.Second || e.Temporary() != temporary[c.kind] {
			t.Errorf("%s %s: %#v", c.code, c.reason, e)
		}
	}
}

func TestAReasonOfAnotherDomainIsLeftOut(t *testing.T) {
	s, err := status.New(codes.FailedPrecondition, "").WithDetails(&errdetails.ErrorInfo{Domain: "proxy.example", Reason: "ACCOUNT_DISABLED"})
	if err != nil {
		t.Fatal(err)
	}
	if e := errorFromStatus("a", s.Err(), nil); e.Reason != "" || e.Kind != ErrInternal {
		t.Errorf("%#v", e)
	}
}

func TestAnErrorIsFoundByItsTypeItsKindAndItsCause(t *testing.T) {
	var err error = errorFromStatus("acme", refusal(codes.FailedPrecondition, "CREDENTIAL_REJECTED", 0), nil)
	var e *Error
	if !errors.As(err, &e) || !errors.Is(err, ErrCredentialRejected) || errors.Is(err, ErrNotGranted) || e.UpstreamCode != "61001" {
		t.Errorf("%#v", err)
	}
	expected := "token broker: account acme: CREDENTIAL_REJECTED: the text of the broker (upstream code 61001)"
	if err.Error() != expected {
		t.Errorf("%s", err)
	}
	if err := errorFromContext("acme", context.Canceled); !errors.Is(err, context.Canceled) || err.Kind != ErrCancelled {
		t.Errorf("%#v", err)
	}
	if err := errorFromContext("acme", context.DeadlineExceeded); !errors.Is(err, context.DeadlineExceeded) || err.Kind != ErrDeadlineExceeded {
		t.Errorf("%#v", err)
	}
}

func TestANegativePushbackForbidsRetries(t *testing.T) {
	err := refusal(codes.Unavailable, "UPSTREAM_UNAVAILABLE", 0)
	if !errorFromStatus("a", err, metadata.Pairs("grpc-retry-pushback-ms", "-1")).noRetries {
		t.Error("retries are allowed")
	}
	if errorFromStatus("a", err, metadata.Pairs("grpc-retry-pushback-ms", "100")).noRetries {
		t.Error("retries are forbidden")
	}
}
