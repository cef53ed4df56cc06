package tokenbroker

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/types/known/durationpb"

	pb "github.com/token-broker/token-broker/clients/go/tokenbrokerv1"
)

func TestATokenIsKeptUntilItsReuseEndWithoutACall(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		broker := &fakeBroker{get: always(1)}
		client := newClient(t, broker)
		mustToken(t, client, "acme")
		time.Sleep(time.Minute - time.Millisecond)
		mustToken(t, client, "acme")
		wantAsked(t, broker, 1)
		time.Sleep(time.Millisecond)
		mustToken(t, client, "acme")
		wantAsked(t, broker, 2)
	})
}

func TestTheTimesOfAnAnswerCountFromWhenItWasAskedFor(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		broker := &fakeBroker{get: func(context.Context, *pb.GetTokenRequest) (*pb.GetTokenResponse, error) {
			time.Sleep(3 * time.Second)
			return answer(1), nil
		}}
		token := mustToken(t, newClient(t, broker), "acme")
		if token.ExpiresIn() != 2*time.Minute-3*time.Second {
			t.Fatal(token.ExpiresIn())
		}
	})
}

func TestAHundredCallersCauseOneAsk(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		broker := &fakeBroker{get: func(context.Context, *pb.GetTokenRequest) (*pb.GetTokenResponse, error) {
			time.Sleep(time.Second)
			return answer(1), nil
		}}
		client := newClient(t, broker)
		var callers sync.WaitGroup
		for range 100 {
			callers.Go(func() { mustToken(t, client, "acme") })
		}
		callers.Wait()
		wantAsked(t, broker, 1)
	})
}

func TestAHundredCallersTogetherRepeatAFailedAskAsOneDoes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		broker := &fakeBroker{}
		broker.get = func(ctx context.Context, r *pb.GetTokenRequest) (*pb.GetTokenResponse, error) {
			if broker.asked() < 4 {
				return nil, refusal(codes.Unavailable, "UPSTREAM_UNAVAILABLE", 0)
			}
			return answer(1), nil
		}
		client := newClient(t, broker)
		var callers sync.WaitGroup
		for range 100 {
			callers.Go(func() { mustToken(t, client, "acme") })
		}
		callers.Wait()
		wantAsked(t, broker, 4)
	})
}

func TestACallerWhoGivesUpDoesNotEndTheAskOfOthers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		broker := &fakeBroker{get: func(ctx context.Context, _ *pb.GetTokenRequest) (*pb.GetTokenResponse, error) {
			select {
			case <-time.After(2 * time.Second):
				return answer(1), nil
			case <-ctx.Done():
				return nil, ctx.Err()
			}
		}}
		client := newClient(t, broker)
		ctx, cancel := context.WithCancel(t.Context())
		var callers sync.WaitGroup
		callers.Go(func() {
			_, err := client.Token(ctx, "acme")
			if !errors.Is(err, ErrCancelled) || !errors.Is(err, context.Canceled) {
				t.Errorf("%v", err)
			}
		})
		time.Sleep(time.Second)
		callers.Go(func() { mustToken(t, client, "acme") })
		synctest.Wait()
		cancel()
		callers.Wait()
		wantAsked(t, broker, 1)
	})
}

func TestACallerWithALongerTimeoutCausesAnotherAsk(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		broker := &fakeBroker{}
		broker.get = func(ctx context.Context, r *pb.GetTokenRequest) (*pb.GetTokenResponse, error) {
			if broker.asked() == 1 {
				return hanging(ctx, r)
			}
			time.Sleep(time.Second) // so that the first caller, whose time is over, gets no token
			return answer(1), nil
		}
		client := newClient(t, broker)
		start := time.Now()
		var callers sync.WaitGroup
		callers.Go(func() {
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			defer cancel()
			if _, err := client.Token(ctx, "acme"); !errors.Is(err, ErrDeadlineExceeded) {
				t.Errorf("%v", err)
			}
		})
		synctest.Wait()
		callers.Go(func() {
			mustToken(t, client, "acme")
			if waited := time.Since(start); waited != 2*time.Second {
				t.Errorf("waited %s", waited)
			}
		})
		callers.Wait()
		wantAsked(t, broker, 2)
	})
}

func TestTheKeptTokenIsUsedWhileTheBrokerIsAwayAndItsPausesGrow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		broker := &fakeBroker{get: always(1)}
		client := newClient(t, broker)
		mustToken(t, client, "acme")
		time.Sleep(time.Minute)
		broker.get = failing(refusal(codes.Unavailable, "", 0))
		var asks []time.Duration
		start, asked := time.Now(), broker.asked()
		for time.Since(start) < 58*time.Second {
			wantGeneration(t, mustToken(t, client, "acme"), 1)
			if broker.asked() > asked {
				asks, asked = append(asks, time.Since(start)), broker.asked()
			}
			time.Sleep(10 * time.Millisecond)
		}
		if len(asks) < 5 || len(asks) > 9 {
			t.Fatalf("asked after %v", asks)
		}
		time.Sleep(time.Second)
		if _, err := client.Token(t.Context(), "acme"); !errors.Is(err, ErrUnavailable) {
			t.Fatalf("%v", err)
		}
	})
}

func TestASlowBrokerDelaysTheUseOfAKeptTokenByTwoSecondsOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		broker := &fakeBroker{get: always(1)}
		client := newClient(t, broker)
		mustToken(t, client, "acme")
		time.Sleep(time.Minute)
		broker.get = hanging
		start := time.Now()
		mustToken(t, client, "acme")
		if waited := time.Since(start); waited != 2*time.Second {
			t.Fatalf("waited %s", waited)
		}
		mustToken(t, client, "acme")
		if waited := time.Since(start); waited != 2*time.Second {
			t.Fatalf("waited again, %s in all", waited)
		}
	})
}

func TestACallerWithLittleTimeGetsTheKeptTokenAtItsEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		broker := &fakeBroker{get: always(1)}
		client := newClient(t, broker)
		mustToken(t, client, "acme")
		time.Sleep(time.Minute)
		broker.get = hanging
		ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		defer cancel()
		if _, err := client.Token(ctx, "acme"); err != nil {
			t.Fatal(err)
		}
	})
}

func TestAtTheTimeoutTheLastErrorSaysWhy(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		broker := &fakeBroker{}
		broker.get = func(ctx context.Context, r *pb.GetTokenRequest) (*pb.GetTokenResponse, error) {
			if broker.asked() > 2 {
				return hanging(ctx, r)
			}
			return nil, refusal(codes.Unavailable, "UPSTREAM_UNAVAILABLE", 0)
		}
		start := time.Now()
		_, err := newClient(t, broker).Token(t.Context(), "acme")
		if !errors.Is(err, ErrUnavailable) || time.Since(start) != DefaultTimeout {
			t.Fatalf("%v after %s", err, time.Since(start))
		}
		wantAsked(t, broker, 3)
	})
}

func TestAnErrorIsReturnedAtOnceWhereWaitingIsInVain(t *testing.T) {
	for name, broker := range map[string]*fakeBroker{
		"a long pause":        {get: failing(refusal(codes.Unavailable, "UPSTREAM_UNAVAILABLE", time.Minute))},
		"a negative pushback": {get: failing(refusal(codes.Unavailable, "", 0)), trailer: metadata.Pairs("grpc-retry-pushback-ms", "-1")},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				start := time.Now()
				if _, err := newClient(t, broker).Token(t.Context(), "acme"); !errors.Is(err, ErrUnavailable) {
					t.Fatalf("%v", err)
				}
				if waited := time.Since(start); waited != 0 {
					t.Fatalf("waited %s", waited)
				}
				wantAsked(t, broker, 1)
			})
		})
	}
}

func TestThePauseOfRetryInfoIsWaitedFor(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		broker := &fakeBroker{}
		broker.get = func(context.Context, *pb.GetTokenRequest) (*pb.GetTokenResponse, error) {
			if broker.asked() == 1 {
				return nil, refusal(codes.ResourceExhausted, "OVERLOADED", 3*time.Second)
			}
			return answer(1), nil
		}
		start := time.Now()
		mustToken(t, newClient(t, broker), "acme")
		if waited := time.Since(start); waited != 3*time.Second {
			t.Fatalf("waited %s", waited)
		}
	})
}

func TestARefusalForgetsTheTokenAndIsRememberedForASecond(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		broker := &fakeBroker{get: always(1)}
		client := newClient(t, broker)
		mustToken(t, client, "acme")
		time.Sleep(time.Minute)
		broker.get = failing(refusal(codes.PermissionDenied, "NOT_GRANTED", 0))
		for range 10 {
			if _, err := client.Token(t.Context(), "acme"); !errors.Is(err, ErrNotGranted) {
				t.Fatalf("%v", err)
			}
		}
		wantAsked(t, broker, 2)
		broker.get = always(2)
		time.Sleep(time.Second)
		wantGeneration(t, mustToken(t, client, "acme"), 2)
	})
}

func TestAccountsAboutWhichNothingNeedBeKnownAreForgotten(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		broker := &fakeBroker{get: always(1)}
		client := newClient(t, broker)
		mustToken(t, client, "kept")
		broker.get = failing(refusal(codes.NotFound, "NO_SUCH_ACCOUNT", 0))
		for i := range 1000 {
			if _, err := client.Token(t.Context(), fmt.Sprint(i)); !errors.Is(err, ErrNoSuchAccount) {
				t.Fatal(err)
			}
			time.Sleep(50 * time.Millisecond)
		}
		if known := len(client.core.accounts); known > mostUnused+1 {
			t.Fatalf("%d accounts are known", known)
		}
		mustToken(t, client, "kept")
		wantAsked(t, broker, 1001)
	})
}

func TestAnAnswerWithAnOlderGenerationIsNotUsed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		broker := &fakeBroker{get: always(5)}
		client := newClient(t, broker)
		mustToken(t, client, "acme")
		time.Sleep(time.Minute)
		broker.get = always(4)
		wantGeneration(t, mustToken(t, client, "acme"), 5)
	})
}

func TestAnUnusableAnswerIsAnInternalError(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		broker := &fakeBroker{get: func(context.Context, *pb.GetTokenRequest) (*pb.GetTokenResponse, error) {
			return &pb.GetTokenResponse{}, nil
		}}
		if _, err := newClient(t, broker).Token(t.Context(), "acme"); !errors.Is(err, ErrInternal) {
			t.Fatalf("%v", err)
		}
	})
}

func TestATokenThatHasEndedOnArrivalIsNotReturned(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		broker := &fakeBroker{}
		broker.get = func(context.Context, *pb.GetTokenRequest) (*pb.GetTokenResponse, error) {
			next := answer(uint64(broker.asked()))
			if broker.asked() == 1 {
				next.ExpiresIn = durationpb.New(endMargin)
			}
			return next, nil
		}
		wantGeneration(t, mustToken(t, newClient(t, broker), "acme"), 2)
	})
}

func TestABearerThatTheBrokerDoesNotKnowIsReadAgainAndTheAskRepeatedOnce(t *testing.T) {
	file := filepath.Join(t.TempDir(), "bearer")
	write := func(bearer string) {
		if err := os.WriteFile(file, []byte(bearer+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("tbk_old")
	synctest.Test(t, func(t *testing.T) {
		broker := &fakeBroker{}
		broker.get = func(context.Context, *pb.GetTokenRequest) (*pb.GetTokenResponse, error) {
			if broker.bearers[len(broker.bearers)-1] != "Bearer tbk_new" {
				return nil, refusal(codes.Unauthenticated, "CREDENTIAL_REFUSED", 0)
			}
			return answer(1), nil
		}
		client, err := New(Config{Endpoints: []string{"http://127.0.0.1:1"}, BearerFile: file})
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = client.Close() }()
		useBroker(client, broker)
		if _, err := client.Token(t.Context(), "acme"); !errors.Is(err, ErrUnauthenticated) {
			t.Fatalf("%v", err)
		}
		wantAsked(t, broker, 1)
		write("tbk_new")
		if _, err := client.Token(t.Context(), "other"); err != nil {
			t.Fatal(err)
		}
		wantAsked(t, broker, 3)
	})
}

func TestAClosedClientFailsWaitingAndLaterCalls(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		broker := &fakeBroker{get: hanging}
		client := newClient(t, broker)
		var callers sync.WaitGroup
		callers.Go(func() {
			if _, err := client.Token(t.Context(), "acme"); !errors.Is(err, ErrClosed) {
				t.Errorf("%v", err)
			}
		})
		synctest.Wait()
		start := time.Now()
		for range 2 {
			if err := client.Close(); err != nil || time.Since(start) != 0 {
				t.Fatalf("%v after %s", err, time.Since(start))
			}
		}
		callers.Wait()
		if _, err := client.Token(t.Context(), "acme"); !errors.Is(err, ErrClosed) {
			t.Fatalf("%v", err)
		}
		if _, err := client.Report(t.Context(), "acme", 1, "61003"); !errors.Is(err, ErrClosed) {
			t.Fatalf("%v", err)
		}
	})
}

func TestAClientThatIsNoLongerUsedLeavesNoGoroutine(t *testing.T) {
	before := runtime.NumGoroutine()
	func() {
		broker := &fakeBroker{get: always(1)}
		client, err := New(Config{Endpoints: []string{"http://127.0.0.1:1"}})
		if err != nil {
			t.Fatal(err)
		}
		useBroker(client, broker)
		mustToken(t, client, "acme")
	}()
	for deadline := time.Now().Add(30 * time.Second); runtime.NumGoroutine() > before; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%d goroutines, %d before", runtime.NumGoroutine(), before)
		}
		runtime.GC()
	}
}

func TestSettingsThatCannotBeUsedAreRefused(t *testing.T) {
	empty := filepath.Join(t.TempDir(), "empty")
	bearer := filepath.Join(t.TempDir(), "bearer")
	for file, content := range map[string]string{empty: " \n", bearer: "tbk_x"} {
		if err := os.WriteFile(file, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	one := func(endpoint string) []string { return []string{endpoint} }
	for name, config := range map[string]Config{
		"no endpoint":                {},
		"no scheme":                  {Endpoints: one("broker:50051")},
		"another scheme":             {Endpoints: one("dns:///broker:50051")},
		"no port":                    {Endpoints: one("https://broker")},
		"an empty port":              {Endpoints: one("https://broker:")},
		"port 0":                     {Endpoints: one("https://broker:0")},
		"a port that is too large":   {Endpoints: one("https://broker:65536")},
		"a path":                     {Endpoints: one("https://broker:50051/v1")},
		"a password":                 {Endpoints: one("https://user:password@broker:50051")},
		"two schemes":                {Endpoints: []string{"http://127.0.0.1:1", "https://127.0.0.1:2"}},
		"a bearer without TLS":       {Endpoints: one("http://broker:50051"), BearerFile: bearer},
		"a missing bearer":           {Endpoints: one("https://broker:50051"), BearerFile: bearer + ".missing"},
		"an empty bearer":            {Endpoints: one("https://broker:50051"), BearerFile: empty},
		"a certificate without key":  {Endpoints: one("https://broker:50051"), ClientCertFile: bearer},
		"a CA that is none":          {Endpoints: one("https://broker:50051"), CAFile: bearer},
		"a CA for plaintext":         {Endpoints: one("http://127.0.0.1:1"), CAFile: bearer},
		"a certificate that is none": {Endpoints: one("https://broker:50051"), ClientCertFile: bearer, ClientKeyFile: bearer},
		"a negative timeout":         {Endpoints: one("https://broker:50051"), Timeout: -1},
	} {
		client, err := New(config)
		if !errors.Is(err, ErrInvalidArgument) || client != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	for name, config := range map[string]Config{
		"loopback":               {Endpoints: one("http://127.0.0.1:1"), BearerFile: bearer},
		"loopback by name":       {Endpoints: one("http://localhost:1"), BearerFile: bearer},
		"loopback of IPv6":       {Endpoints: one("http://[::1]:1"), BearerFile: bearer},
		"loopback of both":       {Endpoints: one("http://[::ffff:127.0.0.1]:1"), BearerFile: bearer},
		"plaintext on request":   {Endpoints: one("http://broker:1"), BearerFile: bearer, AllowPlaintextBearer: true},
		"the system's roots":     {Endpoints: one("https://broker:1/"), BearerFile: bearer},
		"a scheme in capitals":   {Endpoints: one("HTTPS://Broker:1")},
		"a host with underscore": {Endpoints: one("https://a_broker:1")},
		"nothing to identify by": {Endpoints: one("https://broker:1")},
	} {
		client, err := New(config)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		_ = client.Close()
	}
}

func TestTheEnvironmentHasTheSettings(t *testing.T) {
	for name, value := range map[string]string{
		"ENDPOINT": "https://a:1, https://b:2", "BEARER_FILE": "b", "CA_FILE": "c", "CLIENT_CERT": "d", "CLIENT_KEY": "e",
	} {
		t.Setenv("TOKEN_BROKER_"+name, value)
	}
	c := ConfigFromEnv()
	if len(c.Endpoints) != 2 || c.Endpoints[1] != "https://b:2" || c.BearerFile != "b" || c.CAFile != "c" ||
		c.ClientCertFile != "d" || c.ClientKeyFile != "e" {
		t.Fatalf("%+v", c)
	}
}

// reentrant is a handler of logs that uses the client, as one that sends logs to an API with a token does.
type reentrant struct {
	slog.Handler
	client **Client
}

func (h reentrant) Handle(ctx context.Context, record slog.Record) error {
	if *h.client != nil {
		_ = (*h.client).String()
	}
	return h.Handler.Handle(ctx, record)
}

func TestAHandlerOfLogsMayUseTheClient(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		broker := &fakeBroker{get: always(1)}
		client := newClient(t, broker)
		client.core.logger = slog.New(reentrant{slog.NewTextHandler(io.Discard, &slog.HandlerOptions{Level: slog.LevelDebug}), &client})
		mustToken(t, client, "acme")
		time.Sleep(additionsDelay)
		synctest.Wait()
		stream := wantStream(t, broker, 1, "acme")
		stream.push("acme", answer(2))
		broker.get = hanging
		time.Sleep(time.Minute)
		mustToken(t, client, "acme")
		stream.endAccount("acme")
		stream.end <- refusal(codes.PermissionDenied, "NOT_GRANTED", 0)
		synctest.Wait()
	})
}
