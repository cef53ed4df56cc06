package tokenbroker

import (
	"errors"
	"io"
	"os"
	"path/filepath"
	"testing"
	"testing/synctest"
	"time"

	"google.golang.org/grpc/codes"

	pb "github.com/token-broker/token-broker/clients/go/tokenbrokerv1"
)

// watched returns a client that has a token of the account and watches it.
func watched(t *testing.T, broker *fakeBroker) (*Client, *fakeStream) {
	t.Helper()
	client := newClient(t, broker)
	mustToken(t, client, "acme")
	time.Sleep(additionsDelay)
	synctest.Wait()
	return client, wantStream(t, broker, 1, "acme")
}

func TestAPushedTokenIsUsedAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		broker := &fakeBroker{get: always(1)}
		client, stream := watched(t, broker)
		stream.push("acme", answer(2))
		wantGeneration(t, mustToken(t, client, "acme"), 2)
		stream.push("acme", answer(1))
		wantGeneration(t, mustToken(t, client, "acme"), 2)
		wantAsked(t, broker, 1)
	})
}

func TestAPushedTokenAnswersCallersWhoAreWaiting(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		broker := &fakeBroker{get: always(1)}
		client, stream := watched(t, broker)
		time.Sleep(2 * time.Minute)
		broker.get = hanging
		got := make(chan *Token)
		go func() { got <- mustToken(t, client, "acme") }()
		synctest.Wait()
		stream.push("acme", answer(2))
		wantGeneration(t, <-got, 2)
	})
}

func TestAnEndedAccountIsForgottenAndTheNextCallerHearsWhy(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		broker := &fakeBroker{get: always(1)}
		client, stream := watched(t, broker)
		stream.endAccount("acme")
		broker.get = failing(refusal(codes.NotFound, "NO_SUCH_ACCOUNT", 0))
		if _, err := client.Token(t.Context(), "acme"); !errors.Is(err, ErrNoSuchAccount) {
			t.Fatalf("%v", err)
		}
		broker.get = always(2)
		time.Sleep(5 * time.Second)
		mustToken(t, client, "acme")
		time.Sleep(additionsDelay)
		synctest.Wait()
		wantStream(t, broker, 2, "acme")
	})
}

func TestAnAddedAccountBringsANewStreamAndTheOldOneEndsWhenThatHasAnswered(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		broker := &fakeBroker{get: always(1)}
		client, first := watched(t, broker)
		mustToken(t, client, "zebra")
		time.Sleep(additionsInterval - time.Millisecond)
		wantStream(t, broker, 1, "acme")
		if first.ctx.Err() != nil {
			t.Fatal("the first stream has ended")
		}
		time.Sleep(time.Millisecond)
		synctest.Wait()
		wantStream(t, broker, 2, "acme", "zebra")
		if first.ctx.Err() == nil {
			t.Fatal("the first stream goes on")
		}
	})
}

func TestAStreamThatEndsIsOpenedAgainAndTheTokensStay(t *testing.T) {
	for name, end := range map[string]error{"with a status": refusal(codes.Unavailable, "", 0), "without one": io.EOF} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				broker := &fakeBroker{get: always(1)}
				client, stream := watched(t, broker)
				stream.push("acme", answer(2))
				time.Sleep(shortestLife)
				stream.end <- end
				synctest.Wait()
				again := wantStream(t, broker, 2, "acme")
				wantGeneration(t, mustToken(t, client, "acme"), 2)
				again.end <- end
				synctest.Wait()
				wantStream(t, broker, 2, "acme")
				time.Sleep(firstPauseOfWatch)
				synctest.Wait()
				wantStream(t, broker, 3, "acme")
				wantAsked(t, broker, 1)
			})
		})
	}
}

func TestAStreamThatHangsIsReplaced(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		broker := &fakeBroker{get: always(1), hanging: 1}
		client := newClient(t, broker)
		mustToken(t, client, "acme")
		time.Sleep(additionsDelay)
		synctest.Wait()
		hung := wantStream(t, broker, 1, "acme")
		time.Sleep(longestOpening + firstPauseOfWatch)
		synctest.Wait()
		if hung.ctx.Err() == nil {
			t.Fatal("the stream goes on")
		}
		wantStream(t, broker, 2, "acme").push("acme", answer(2))
		synctest.Wait()
		wantGeneration(t, mustToken(t, client, "acme"), 2)
	})
}

func TestAStreamOfAnUnknownBearerForgetsAllTokensAndIsOpenedAgainAfterTenSeconds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		broker := &fakeBroker{get: always(1)}
		client, stream := watched(t, broker)
		stream.end <- refusal(codes.Unauthenticated, "CREDENTIAL_REFUSED", 0)
		synctest.Wait()
		broker.get = failing(refusal(codes.Unauthenticated, "CREDENTIAL_REFUSED", 0))
		if _, err := client.Token(t.Context(), "acme"); !errors.Is(err, ErrUnauthenticated) {
			t.Fatalf("%v", err)
		}
		time.Sleep(10*time.Second - time.Millisecond)
		wantStream(t, broker, 1, "acme")
		time.Sleep(time.Millisecond)
		synctest.Wait()
		wantStream(t, broker, 2, "acme")
	})
}

func TestAStreamOfAReplacedBearerIsOpenedAgainAtOnce(t *testing.T) {
	file := filepath.Join(t.TempDir(), "bearer")
	write := func(bearer string) {
		if err := os.WriteFile(file, []byte(bearer), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("tbk_old")
	synctest.Test(t, func(t *testing.T) {
		broker := &fakeBroker{get: always(1)}
		client, err := New(Config{Endpoints: []string{"http://127.0.0.1:1"}, BearerFile: file})
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = client.Close() }()
		useBroker(client, broker)
		mustToken(t, client, "acme")
		time.Sleep(additionsDelay)
		synctest.Wait()
		stream := wantStream(t, broker, 1, "acme")
		write("tbk_new")
		stream.end <- refusal(codes.Unauthenticated, "CREDENTIAL_REFUSED", 0)
		synctest.Wait()
		wantStream(t, broker, 2, "acme")
		if last := broker.bearers[len(broker.bearers)-1]; last != "Bearer tbk_new" {
			t.Fatal(last)
		}
		wantGeneration(t, mustToken(t, client, "acme"), 1)
		wantAsked(t, broker, 1)
	})
}

func TestARefusedStreamMakesAllItsAccountsAskAndThoseThatMayJoinAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		broker := &fakeBroker{get: always(1)}
		broker.watch = func(r *pb.WatchTokensRequest) error {
			if len(r.GetAccounts()) > 1 {
				return refusal(codes.NotFound, "NO_SUCH_ACCOUNT", 0)
			}
			return nil
		}
		client := newClient(t, broker)
		mustToken(t, client, "acme")
		mustToken(t, client, "gone")
		time.Sleep(additionsDelay)
		synctest.Wait()
		wantStream(t, broker, 1, "acme", "gone")
		mustToken(t, client, "acme")
		wantAsked(t, broker, 3)
		time.Sleep(additionsInterval)
		synctest.Wait()
		wantStream(t, broker, 2, "acme")
	})
}

func TestAnAccountThatIsNotUsedForAnHourLeavesTheWatchAndComesBackWithItsNextUse(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		broker := &fakeBroker{get: always(1)}
		client, stream := watched(t, broker)
		time.Sleep(unusedAfter)
		long := answer(2)
		long.ReuseFor.Seconds, long.ExpiresIn.Seconds = 36000, 36000
		stream.push("acme", long)
		time.Sleep(time.Second)
		mustToken(t, client, "zebra")
		time.Sleep(additionsDelay)
		synctest.Wait()
		wantStream(t, broker, 2, "zebra")
		mustToken(t, client, "acme")
		wantAsked(t, broker, 3)
		time.Sleep(additionsInterval)
		synctest.Wait()
		wantStream(t, broker, 3, "acme", "zebra")
	})
}
