package tokenbroker

import (
	"bytes"
	"encoding/json"
	"io"
	"net/http"
	"net/url"
	"runtime"
	"strings"
)

// longestRefusal is the size up to which the body of an answer is searched for the upstream's error code.
const longestRefusal = 64 << 10

// Transport is an [http.RoundTripper] that puts the token of an account on each request. If the API answers that it
// refuses the token, Transport reports that to the broker and sends the request again, once, with the next token; a
// request whose body cannot be sent again ([http.Request.GetBody]) is answered as the API did.
//
// It sends a token to the API of that token only, and fails with [ErrWrongHost] for any other host, also after a
// redirect.
type Transport struct {
	// Client has the tokens.
	Client *Client
	// Account is the account whose token is used.
	Account string
	// Base sends the requests. nil means [http.DefaultTransport].
	Base http.RoundTripper
}

// RoundTrip sends a request with the account's token. It waits for the token, and for its replacement, until the
// request's context ends; if that has no deadline, for at most [Config.Timeout] each.
func (t *Transport) RoundTrip(request *http.Request) (*http.Response, error) {
	defer runtime.KeepAlive(t.Client)
	sent := false // the base closes the body of a request that it gets
	defer func() {
		if !sent && request.Body != nil {
			_ = request.Body.Close()
		}
	}()
	token, err := t.Client.Token(request.Context(), t.Account)
	if err != nil {
		return nil, err
	}
	if err := checkOrigin(token, request.URL); err != nil {
		return nil, err
	}

	sent = true
	response, sendErr := t.base().RoundTrip(withToken(request, request.Body, token))
	if sendErr != nil {
		return nil, sendErr
	}
	code := refusalCode(response)
	if code == "" {
		return response, nil
	}
	ctx, cancel := t.Client.core.withTimeout(request.Context())
	defer cancel()
	next := t.Client.core.replacement(ctx, token, code)
	if next == nil || checkOrigin(next, request.URL) != nil {
		return response, nil
	}
	body, ok := bodyAgain(request)
	if !ok {
		return response, nil
	}
	_ = response.Body.Close()
	return t.base().RoundTrip(withToken(request, body, next))
}

func (t *Transport) base() http.RoundTripper {
	if t.Base != nil {
		return t.Base
	}
	return http.DefaultTransport
}

// CloseIdleConnections closes those of the base, for [http.Client.CloseIdleConnections].
func (t *Transport) CloseIdleConnections() {
	if base, ok := t.base().(interface{ CloseIdleConnections() }); ok {
		base.CloseIdleConnections()
	}
}

// withToken returns a copy of the request, because a RoundTripper must not change it.
func withToken(request *http.Request, body io.ReadCloser, token *Token) *http.Request {
	request = request.Clone(request.Context())
	request.Body = body
	if request.Header == nil {
		request.Header = make(http.Header)
	}
	request.Header.Set("Authorization", "Bearer "+token.AccessToken())
	return request
}

// bodyAgain returns the body for a second try, and false if it cannot be sent again.
func bodyAgain(request *http.Request) (io.ReadCloser, bool) {
	if request.Body == nil || request.Body == http.NoBody {
		return request.Body, true
	}
	if request.GetBody == nil {
		return nil, false
	}
	body, err := request.GetBody()
	return body, err == nil
}

// checkOrigin returns an error if the URL is not one of the API for which the token is valid.
func checkOrigin(token *Token, target *url.URL) error {
	api, err := url.Parse(token.APIBaseURL())
	if err == nil && api.Host != "" && origin(api) == origin(target) {
		return nil
	}
	return &Error{
		Kind:    ErrWrongHost,
		Account: token.Account(),
		Message: "the token is valid for " + token.APIBaseURL() + ", so it is not sent to " + origin(target),
	}
}

// origin returns the scheme, host and port of a URL in one form.
func origin(u *url.URL) string {
	scheme, port := strings.ToLower(u.Scheme), u.Port()
	if port == "" {
		port = map[string]string{"http": "80", "https": "443"}[scheme]
	}
	return scheme + "://" + strings.ToLower(u.Hostname()) + ":" + port
}

// refusalCode returns the upstream's error code if the answer says that the token was refused, and "" otherwise. The
// body of the answer can be read as before.
func refusalCode(response *http.Response) string {
	if response.StatusCode < 400 || response.Body == nil || response.ContentLength > longestRefusal {
		return ""
	}
	head, err := io.ReadAll(io.LimitReader(response.Body, longestRefusal+1))
	rest := io.Reader(response.Body)
	if err != nil {
		rest = failingReader{err} // the program gets it when it reads the body
	}
	response.Body = struct {
		io.Reader
		io.Closer
	}{io.MultiReader(bytes.NewReader(head), rest), response.Body}
	if err != nil || len(head) > longestRefusal {
		return ""
	}
	switch code := upstreamCode(head); code {
	case "61003", "61004":
		return code
	default:
		return ""
	}
}

// upstreamCode returns `error.code` of a JSON object, or else its `code`, as text.
func upstreamCode(body []byte) string {
	var answer struct {
		Error json.RawMessage `json:"error"`
		Code  json.RawMessage `json:"code"`
	}
	if json.Unmarshal(body, &answer) != nil {
		return ""
	}
	var inner struct {
		Code json.RawMessage `json:"code"`
	}
	if json.Unmarshal(answer.Error, &inner) == nil && inner.Code != nil {
		answer.Code = inner.Code
	}
	return strings.Trim(string(answer.Code), `"`)
}

// failingReader is the rest of a body that could not be read.
type failingReader struct{ err error }

func (r failingReader) Read([]byte) (int, error) { return 0, r.err }
