// Package oauth2source makes an [oauth2.TokenSource] of a client of Token Broker, for libraries that want one. Where
// an [http.RoundTripper] will do, use [tokenbroker.Transport]: it also reports tokens that the API refuses.
package oauth2source

import (
	"context"
	"time"

	"golang.org/x/oauth2"

	tokenbroker "github.com/token-broker/token-broker/clients/go"
)

// longestLife is how long the tokens of a source claim to be valid at most. Wrappers that keep a token until shortly
// before its expiry, such as [oauth2.ReuseTokenSource], which [oauth2.NewClient] adds, would otherwise go on with one
// that the upstream no longer accepts because there is a newer one. Asking the client costs nothing.
const longestLife = 15 * time.Second

// New returns a source of tokens of the account. Its calls end when the context does.
func New(ctx context.Context, client *tokenbroker.Client, account string) oauth2.TokenSource {
	return source{ctx, client, account}
}

type source struct {
	ctx     context.Context
	client  *tokenbroker.Client
	account string
}

// Token returns a token that may be used now. Its error is a [*tokenbroker.Error].
func (s source) Token() (*oauth2.Token, error) {
	token, err := s.client.Token(s.ctx, s.account)
	if err != nil {
		return nil, err
	}
	return &oauth2.Token{
		AccessToken: token.AccessToken(),
		TokenType:   "Bearer",
		Expiry:      time.Now().Add(min(token.ExpiresIn(), longestLife)),
	}, nil
}
