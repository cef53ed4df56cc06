package tokenbroker

import (
	"fmt"
	"io"
	"log/slog"
	"time"

	pb "github.com/token-broker/token-broker/clients/go/tokenbrokerv1"
)

// endMargin is how long before its end a token counts as ended, because a request needs time to reach the API.
const endMargin = time.Second

// Token is an upstream token of an account. It never changes, and all of its text forms leave out the secret.
type Token struct {
	account    string
	secret     *string // a pointer, so that fmt prints an address where a Token is an unexported field of a printed struct
	generation uint64
	allowedIP  string
	apiBaseURL string
	reuseEnd   time.Time
	end        time.Time
}

// AccessToken returns the upstream's JWT, which goes into the header `Authorization: Bearer …`.
func (t *Token) AccessToken() string { return *t.secret }

// Account returns the account's name.
func (t *Token) Account() string { return t.account }

// Generation returns a number that grows with each new token of the account.
func (t *Token) Generation() uint64 { return t.generation }

// AllowedIP returns the address from which the upstream may accept the token, or "" if the token names none.
func (t *Token) AllowedIP() string { return t.allowedIP }

// APIBaseURL returns the base URL of the API for which the token is valid.
func (t *Token) APIBaseURL() string { return t.apiBaseURL }

// ExpiresIn returns how long the token remains valid. It is measured by the monotonic clock, so it is right even where
// the wall clock is not.
func (t *Token) ExpiresIn() time.Duration { return time.Until(t.end) }

// String describes the token without its secret.
func (t Token) String() string {
	return fmt.Sprintf("token of account %s, generation %d", t.account, t.generation)
}

// Format writes the same as String for each verb, so that none prints the secret.
func (t Token) Format(s fmt.State, _ rune) { _, _ = io.WriteString(s, t.String()) }

// LogValue describes the token without its secret.
func (t Token) LogValue() slog.Value {
	return slog.GroupValue(slog.String("account", t.account), slog.Uint64("generation", t.generation))
}

// newToken makes a Token of an answer that arrived at the given time. It returns nil if the answer lacks a token or
// does not say for how long it may be used.
func newToken(account string, answer *pb.GetTokenResponse, arrival time.Time) *Token {
	reuse, expires := answer.GetReuseFor().AsDuration(), answer.GetExpiresIn().AsDuration()
	secret := answer.GetAccessToken()
	if secret == "" || reuse <= 0 || expires <= 0 {
		return nil
	}
	return &Token{
		account:    account,
		secret:     &secret,
		generation: answer.GetGeneration(),
		allowedIP:  answer.GetAllowedIp(),
		apiBaseURL: answer.GetApiBaseUrl(),
		reuseEnd:   arrival.Add(reuse),
		end:        arrival.Add(expires),
	}
}

// ended reports whether the token should no longer be sent.
func (t *Token) ended(now time.Time) bool { return !now.Before(t.end.Add(-endMargin)) }

// replaces reports whether t is to be kept instead of kept. A token of an older generation is used only where
// nothing else is left.
func (t *Token) replaces(kept *Token, now time.Time) bool {
	if kept == nil || t.generation > kept.generation || kept.ended(now) {
		return true
	}
	return t.generation == kept.generation && *t.secret == *kept.secret && t.reuseEnd.After(kept.reuseEnd)
}
