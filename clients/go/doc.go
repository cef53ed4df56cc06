// Package tokenbroker keeps the upstream tokens of accounts for a program, as Token Broker issues them.
//
// A [Client] asks the broker for a token once, keeps it for as long as the broker says, and watches for its
// replacement. [Client.Token] therefore returns at once nearly always, also while the broker is away. [Transport] puts
// the token on the requests of an [net/http.Client] and reports tokens that the API refuses. The package oauth2source
// is for libraries that want an oauth2.TokenSource.
//
// The text forms of all types leave out tokens and bearers, and so do all log lines.
package tokenbroker
