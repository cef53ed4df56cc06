package tokenbroker

import (
	"context"
	"errors"
	"io"
	"net/http"
	"strings"
	"sync"
	"testing"
	"testing/iotest"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/known/durationpb"

	pb "github.com/token-broker/token-broker/clients/go/tokenbrokerv1"
)

type outcome = pb.ReportRejectedTokenResponse_Outcome

func reporting(o outcome, after time.Duration) func(context.Context, *pb.ReportRejectedTokenRequest) (*pb.ReportRejectedTokenResponse, error) {
	return func(context.Context, *pb.ReportRejectedTokenRequest) (*pb.ReportRejectedTokenResponse, error) {
		return &pb.ReportRejectedTokenResponse{Outcome: o, RetryAfter: durationpb.New(after)}, nil
	}
}

// issuing answers asks with the generation after the one that was refused, a second later.
func issuing(_ context.Context, r *pb.GetTokenRequest) (*pb.GetTokenResponse, error) {
	if r.GetNewerThanGeneration() > 0 {
		time.Sleep(time.Second)
	}
	next := answer(r.GetNewerThanGeneration() + 1)
	next.AccessToken = "token" + string(rune('0'+next.Generation))
	return next, nil
}

// api is an API that refuses all tokens but one.
type api struct {
	accepts string
	status  int
	body    string

	mu       sync.Mutex
	requests []string // authorization and body
}

func (a *api) RoundTrip(r *http.Request) (*http.Response, error) {
	body := ""
	if r.Body != nil {
		content, err := io.ReadAll(r.Body)
		if err != nil {
			return nil, err
		}
		_ = r.Body.Close()
		body = string(content)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.requests = append(a.requests, r.Header.Get("Authorization")+" "+body)
	if r.Header.Get("Authorization") == "Bearer "+a.accepts {
		return &http.Response{StatusCode: 200, Body: io.NopCloser(strings.NewReader("done")), Request: r}, nil
	}
	return &http.Response{StatusCode: a.status, ContentLength: -1, Body: io.NopCloser(strings.NewReader(a.body)), Request: r}, nil
}

func send(t *testing.T, client *Client, base http.RoundTripper, url string, body io.Reader) (int, string, error) {
	t.Helper()
	request, err := http.NewRequestWithContext(t.Context(), http.MethodPost, url, body)
	if err != nil {
		t.Fatal(err)
	}
	response, err := (&http.Client{Transport: &Transport{Client: client, Account: "acme", Base: base}}).Do(request)
	if err != nil {
		return 0, "", err
	}
	defer func() { _ = response.Body.Close() }()
	text, err := io.ReadAll(response.Body)
	if err != nil {
		t.Fatal(err)
	}
	return response.StatusCode, string(text), nil
}

func TestARefusedTokenIsReportedAndTheRequestSentAgainOnceWithTheNextOne(t *testing.T) {
	for name, refused := range map[string]string{
		"text":         `{"error":{"code":"61003","message":"expired"}}`,
		"a number":     `{"error":{"code":61004}}`,
		"at the top":   `{"code":"61003"}`,
		"beside error": `{"error":"denied","code":61003}`,
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				broker := &fakeBroker{get: issuing, report: reporting(pb.ReportRejectedTokenResponse_OUTCOME_REISSUING, 0)}
				base := &api{accepts: "token2", status: 401, body: refused}
				status, body, err := send(t, newClient(t, broker), base, "https://api.example/v1", strings.NewReader("hello"))
				if err != nil || status != 200 || body != "done" {
					t.Fatalf("%d %s %v", status, body, err)
				}
				if len(base.requests) != 2 || base.requests[0] != "Bearer token1 hello" || base.requests[1] != "Bearer token2 hello" {
					t.Fatal(base.requests)
				}
				if len(broker.reports) != 1 || broker.reports[0].GetGeneration() != 1 || !strings.HasPrefix(broker.reports[0].GetUpstreamCode(), "6100") {
					t.Fatal(broker.reports)
				}
			})
		})
	}
}

func TestWhatIsAnsweredToTheSecondRequestIsGivenToTheProgram(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		broker := &fakeBroker{get: issuing, report: reporting(pb.ReportRejectedTokenResponse_OUTCOME_ALREADY_REPLACED, 0)}
		base := &api{accepts: "none", status: 401, body: `{"code":"61003"}`}
		status, body, err := send(t, newClient(t, broker), base, "https://api.example", nil)
		if err != nil || status != 401 || body != base.body || len(base.requests) != 2 {
			t.Fatalf("%d %s %v %v", status, body, err, base.requests)
		}
	})
}

func TestOtherAnswersAreGivenToTheProgramAsTheyAre(t *testing.T) {
	long := `{"code":"61003","text":"` + strings.Repeat("x", longestRefusal) + `"}`
	for name, c := range map[string]struct {
		status int
		body   string
	}{
		"63001":           {403, `{"error":{"code":"63001"}}`},
		"61001":           {401, `{"error":{"code":"61001"}}`},
		"no JSON":         {500, "61003"},
		"an array":        {400, `["61003"]`},
		"a longer number": {400, `{"code":610030}`},
		"success":         {200, `{"code":"61003"}`},
		"too long":        {401, long},
		"empty":           {502, ""},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				broker := &fakeBroker{get: issuing}
				base := &api{accepts: "none", status: c.status, body: c.body}
				status, body, err := send(t, newClient(t, broker), base, "https://api.example", nil)
				if err != nil || status != c.status || body != c.body || len(base.requests) != 1 {
					t.Fatalf("%d %s %v %v", status, body, err, base.requests)
				}
			})
		})
	}
}

func TestABodyThatBreaksOffKeepsTheStatusAndTheProgramGetsTheFailure(t *testing.T) {
	const start = `{"code":"61003"}`
	// This one fails once, and says afterwards that it has ended.
	body := iotest.TimeoutReader(strings.NewReader(start))
	response := &http.Response{StatusCode: 401, ContentLength: -1, Body: io.NopCloser(body)}
	if code := refusalCode(response); code != "" {
		t.Fatalf("found %s in a body that is not complete", code)
	}
	read, err := io.ReadAll(response.Body)
	if string(read) != start || !errors.Is(err, iotest.ErrTimeout) {
		t.Fatalf("%s %v", read, err)
	}
}

func TestTheProgramGetsTheAnswerOfTheAPIWhereNoNewTokenCanBeHad(t *testing.T) {
	for name, report := range map[string]func(context.Context, *pb.ReportRejectedTokenRequest) (*pb.ReportRejectedTokenResponse, error){
		"not a fault of the token": reporting(pb.ReportRejectedTokenResponse_OUTCOME_NOT_A_TOKEN_FAULT, 0),
		"too soon for the caller":  reporting(pb.ReportRejectedTokenResponse_OUTCOME_TOO_SOON, time.Minute),
		"an error": func(context.Context, *pb.ReportRejectedTokenRequest) (*pb.ReportRejectedTokenResponse, error) {
			return nil, refusal(codes.PermissionDenied, "NOT_GRANTED", 0)
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				broker := &fakeBroker{get: issuing, report: report}
				client := newClient(t, broker)
				base := &api{accepts: "none", status: 401, body: `{"code":"61003"}`}
				status, body, err := send(t, client, base, "https://api.example", nil)
				if err != nil || status != 401 || body != base.body || len(base.requests) != 1 {
					t.Fatalf("%d %s %v %v", status, body, err, base.requests)
				}
				mustToken(t, client, "acme")
				wantAsked(t, broker, 1)
			})
		})
	}
}

func TestAReportThatCameTooSoonIsRepeatedOnceForAll(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		broker := &fakeBroker{get: issuing}
		broker.report = func(ctx context.Context, r *pb.ReportRejectedTokenRequest) (*pb.ReportRejectedTokenResponse, error) {
			if len(broker.reports) == 1 {
				return reporting(pb.ReportRejectedTokenResponse_OUTCOME_TOO_SOON, 2*time.Second)(ctx, r)
			}
			return reporting(pb.ReportRejectedTokenResponse_OUTCOME_REISSUING, 0)(ctx, r)
		}
		client := newClient(t, broker)
		base := &api{accepts: "token2", status: 401, body: `{"code":"61003"}`}
		start := time.Now()
		var requests sync.WaitGroup
		for i := range 10 {
			requests.Go(func() {
				time.Sleep(time.Duration(i) * 100 * time.Millisecond)
				status, _, err := send(t, client, base, "https://api.example", nil)
				if err != nil || status != 200 || time.Since(start) != 3*time.Second {
					t.Errorf("%d %v after %s", status, err, time.Since(start))
				}
			})
		}
		requests.Wait()
		if len(broker.reports) != 2 {
			t.Fatalf("%d reports", len(broker.reports))
		}
	})
}

func TestAHundredRequestsWithARefusedTokenCauseOneReportAndOneAsk(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		broker := &fakeBroker{get: issuing, report: reporting(pb.ReportRejectedTokenResponse_OUTCOME_REISSUING, 0)}
		client := newClient(t, broker)
		mustToken(t, client, "acme")
		base := &api{accepts: "token2", status: 401, body: `{"code":"61003"}`}
		var requests sync.WaitGroup
		for range 100 {
			requests.Go(func() {
				if status, _, err := send(t, client, base, "https://api.example", nil); err != nil || status != 200 {
					t.Errorf("%d %v", status, err)
				}
			})
		}
		requests.Wait()
		if len(broker.reports) != 1 {
			t.Fatalf("%d reports", len(broker.reports))
		}
		wantAsked(t, broker, 2)
	})
}

func TestABodyThatCannotBeSentAgainIsAnsweredAsTheAPIDid(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		broker := &fakeBroker{get: issuing, report: reporting(pb.ReportRejectedTokenResponse_OUTCOME_REISSUING, 0)}
		base := &api{accepts: "token2", status: 401, body: `{"code":"61003"}`}
		once := struct{ io.Reader }{strings.NewReader("hello")} // net/http cannot rewind it
		status, body, err := send(t, newClient(t, broker), base, "https://api.example", once)
		if err != nil || status != 401 || body != base.body || len(base.requests) != 1 || len(broker.reports) != 1 {
			t.Fatalf("%d %s %v %v", status, body, err, base.requests)
		}
	})
}

func TestATokenIsSentToItsAPIOnly(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		broker := &fakeBroker{get: always(1)}
		client := newClient(t, broker)
		base := &api{accepts: secretText}
		for _, url := range []string{
			"http://api.example", "https://api.example:444", "https://api.example.org", "https://example", "https://api.example@evil.example",
		} {
			_, _, err := send(t, client, base, url, strings.NewReader("x"))
			var e *Error
			if !errors.Is(err, ErrWrongHost) || !errors.As(err, &e) || strings.Contains(err.Error(), secretText) {
				t.Errorf("%s: %v", url, err)
			}
		}
		if len(base.requests) != 0 {
			t.Fatal(base.requests)
		}
		for _, url := range []string{"https://API.example:443/x", "HTTPS://api.example/y?z"} {
			if status, _, err := send(t, client, base, url, nil); err != nil || status != 200 {
				t.Errorf("%s: %d %v", url, status, err)
			}
		}
	})
}

// redirecting sends every request elsewhere.
type redirecting struct{ sent int }

func (r *redirecting) RoundTrip(request *http.Request) (*http.Response, error) {
	r.sent++
	header := http.Header{"Location": {"https://elsewhere.example/"}}
	return &http.Response{StatusCode: 307, Header: header, Body: http.NoBody, Request: request}, nil
}

func TestATokenIsNotSentAfterARedirect(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		base := &redirecting{}
		_, _, err := send(t, newClient(t, &fakeBroker{get: always(1)}), base, "https://api.example", nil)
		if !errors.Is(err, ErrWrongHost) || base.sent != 1 {
			t.Fatalf("%v after %d requests", err, base.sent)
		}
	})
}

func TestAReportIsRepeatedAFewTimesWhileTheBrokerIsAway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		broker := &fakeBroker{report: func(context.Context, *pb.ReportRejectedTokenRequest) (*pb.ReportRejectedTokenResponse, error) {
			return nil, refusal(codes.Unavailable, "", 0)
		}}
		if _, err := newClient(t, broker).Report(t.Context(), "acme", 1, "61003"); !errors.Is(err, ErrUnavailable) {
			t.Fatalf("%v", err)
		}
		if len(broker.reports) != mostReports {
			t.Fatalf("%d reports", len(broker.reports))
		}
	})
}

func TestTheOutcomeOfAReportIsReturned(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		broker := &fakeBroker{report: reporting(pb.ReportRejectedTokenResponse_OUTCOME_TOO_SOON, 7*time.Second)}
		report, err := newClient(t, broker).Report(t.Context(), "acme", 1, "61003")
		if err != nil || report.Outcome != TooSoon || report.RetryAfter != 7*time.Second {
			t.Fatalf("%+v %v", report, err)
		}
	})
}

func TestAnUnknownOutcomeIsAnInternalError(t *testing.T) {
	for _, o := range []outcome{pb.ReportRejectedTokenResponse_OUTCOME_UNSPECIFIED, 99} {
		if _, err := newReport("acme", &pb.ReportRejectedTokenResponse{Outcome: o}); err == nil || err.Kind != ErrInternal {
			t.Errorf("%s: %v", o, err)
		}
	}
}
