package tokenbroker

import "time"

const (
	longestWaitForReplacement = 2 * time.Second // how long a caller waits while a kept token is still usable
	firstPauseWithToken       = time.Second
	longestPauseWithToken     = 30 * time.Second
	firstPauseWithoutToken    = 100 * time.Millisecond
	longestPauseWithoutToken  = time.Second
	refusalLife               = time.Second // how long asks get a refusal again without a call
)

// account is what a client knows about one account. Its fields are protected by the mutex of the client.
type account struct {
	name     string
	kept     *Token        // nil if there is none
	changed  chan struct{} // closed and renewed whenever kept gets another token
	usedAt   time.Time     // when the program last wanted the token
	failures int           // failed asks in a row while a usable token was kept
	pauseEnd time.Time     // until then, a kept token is used without asking

	refusal      *Error // the last error that was not temporary
	refusalEnd   time.Time
	ask          *ask // the newest ask for any token, perhaps finished
	newerAsk     *ask // the newest ask with newer_than_generation, perhaps finished
	sharedReport *sharedReport
}

// ask is one GetToken call, which any number of callers wait for.
type ask struct {
	newerThan uint64
	attempt   int       // how many asks of the caller who caused it failed before
	deadline  time.Time // the deadline of the caller who caused it
	done      chan struct{}

	// Set before done is closed.
	token   *Token
	err     *Error
	retryAt time.Time // when the callers may try again
}

func (a *ask) finished() bool {
	select {
	case <-a.done:
		return true
	default:
		return false
	}
}

// decision is what a caller who wants a token does.
type decision int

const (
	decideAsk      decision = iota // ask, and wait for the answer
	decideUse                      // use the kept token, without a call
	decideAskOrUse                 // ask, and use the kept token if that fails or takes long
	decideRefuse                   // return the remembered refusal
)

// decide returns what a caller does who wants a token of a later generation than the given one.
func (a *account) decide(now time.Time, newerThan uint64) decision {
	switch {
	case a.usable(now, newerThan) && (now.Before(a.kept.reuseEnd) || now.Before(a.pauseEnd)):
		return decideUse
	case a.usable(now, newerThan):
		return decideAskOrUse
	case now.Before(a.refusalEnd):
		return decideRefuse
	default:
		return decideAsk
	}
}

func (a *account) usable(now time.Time, newerThan uint64) bool {
	return a.kept != nil && a.kept.generation > newerThan && !a.kept.ended(now)
}

// offer keeps the token if it is newer than the kept one, and returns the one that is kept now.
func (a *account) offer(token *Token, now time.Time) *Token {
	if token.replaces(a.kept, now) {
		a.kept = token
		close(a.changed)
		a.changed = make(chan struct{})
	}
	a.failures, a.pauseEnd = 0, time.Time{}
	a.refusal, a.refusalEnd = nil, time.Time{}
	return a.kept
}

// forget drops the kept token, so that the next caller asks.
func (a *account) forget() { a.kept = nil }

// askSoon makes the next caller ask, without dropping the kept token.
func (a *account) askSoon(now time.Time) {
	if a.kept != nil && now.Before(a.kept.reuseEnd) {
		aged := *a.kept
		aged.reuseEnd = now
		a.kept = &aged
	}
	a.pauseEnd = time.Time{}
}

// unused reports whether nothing need be known about the account: it has no token, no recent refusal, and nothing is
// under way.
func (a *account) unused(now time.Time) bool {
	return !a.usable(now, 0) && now.Sub(a.usedAt) >= refusalLife && !now.Before(a.refusalEnd) &&
		(a.ask == nil || a.ask.finished()) && (a.newerAsk == nil || a.newerAsk.finished()) &&
		(a.sharedReport == nil || a.sharedReport.expired(now))
}

// refused forgets the kept token and remembers the error.
func (a *account) refused(err *Error, now time.Time) {
	a.forget()
	a.refusal, a.refusalEnd = err, now.Add(refusalLife)
}

// failed begins a pause in which a kept token is used without asking. The callers who waited for the same ask all
// report its failure, so nothing happens in a pause; then it returns false.
func (a *account) failed(now time.Time, random float64) bool {
	if now.Before(a.pauseEnd) {
		return false
	}
	a.pauseEnd = now.Add(growingPause(firstPauseWithToken, longestPauseWithToken, a.failures, random))
	a.failures++
	return true
}

// pauseAfter returns the pause after a failed ask while no usable token is kept.
func pauseAfter(err *Error, attempt int, random float64) time.Duration {
	if err.RetryAfter > 0 {
		return err.RetryAfter
	}
	return growingPause(firstPauseWithoutToken, longestPauseWithoutToken, attempt, random)
}

// growingPause returns a pause that starts at first, is doubled for each failure before up to limit, and is shortened
// by up to half. The random number is at least 0 and less than 1.
func growingPause(first, limit time.Duration, failures int, random float64) time.Duration {
	pause := limit
	if failures < 32 { // more would overflow
		pause = min(limit, first<<failures)
	}
	return pause - time.Duration(random/2*float64(pause))
}
