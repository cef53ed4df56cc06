package io.github.tokenbroker.client.spring;

import io.github.tokenbroker.client.RefusedToken;
import io.github.tokenbroker.client.Token;
import io.github.tokenbroker.client.TokenClient;
import java.io.ByteArrayInputStream;
import java.io.IOException;
import java.io.InputStream;
import java.io.SequenceInputStream;
import java.time.Duration;
import java.util.Optional;
import org.springframework.http.HttpHeaders;
import org.springframework.http.HttpRequest;
import org.springframework.http.HttpStatusCode;
import org.springframework.http.client.ClientHttpRequestExecution;
import org.springframework.http.client.ClientHttpRequestInterceptor;
import org.springframework.http.client.ClientHttpResponse;

/**
 * Sends the token of an account with each request of {@code RestClient} or {@code RestTemplate},
 * and sends a request again, once, if the API refused the token. Requests fail with a {@link
 * io.github.tokenbroker.client.TokenBrokerException} if there is no token, or if a request or a
 * redirect goes to another host than that of the API.
 *
 * <p>An interceptor does not see redirects that the request factory follows itself. Use a factory
 * that follows none, such as {@code JdkClientHttpRequestFactory} with {@code Redirect.NEVER}.
 *
 * <p>Add this interceptor as the last one: those behind it would not see the second attempt.
 */
public final class TokenRequestInterceptor implements ClientHttpRequestInterceptor {
  private final TokenClient client;
  private final String account;
  private final Duration timeout;

  /**
   * Makes an interceptor.
   *
   * @param client the client that has the tokens
   * @param account the account whose token is sent
   */
  public TokenRequestInterceptor(TokenClient client, String account) {
    this(client, account, client.timeout());
  }

  /**
   * Makes an interceptor with a timeout of its own.
   *
   * @param client the client that has the tokens
   * @param account the account whose token is sent
   * @param timeout how long a request waits at most for a token, and again for another one if the
   *     API refused the first
   */
  public TokenRequestInterceptor(TokenClient client, String account, Duration timeout) {
    this.client = client;
    this.account = account;
    this.timeout = timeout;
  }

  @Override
  public ClientHttpResponse intercept(
      HttpRequest request, byte[] body, ClientHttpRequestExecution execution) throws IOException {
    Token token = client.token(account, timeout);
    Answer answer = send(token, request, body, execution);
    Optional<Token> newer = answer.refusal().flatMap(code -> client.replace(token, code, timeout));
    if (newer.isEmpty()) {
      return answer;
    }
    answer.close();
    return send(newer.get(), request, body, execution);
  }

  private static Answer send(
      Token token, HttpRequest request, byte[] body, ClientHttpRequestExecution execution)
      throws IOException {
    RefusedToken.checkHost(token, request.getURI());
    request.getHeaders().setBearerAuth(token.value());
    ClientHttpResponse response = execution.execute(request, body);
    try {
      Redirects.check(token, request.getURI(), response.getStatusCode(), response.getHeaders());
      return new Answer(response);
    } catch (IOException | RuntimeException error) {
      response.close();
      throw error;
    }
  }

  /**
   * An answer whose body was read as far as a code is looked for, and can be read by the program
   * all the same.
   */
  private static final class Answer implements ClientHttpResponse {
    private final ClientHttpResponse response;
    private final byte[] start;

    Answer(ClientHttpResponse response) throws IOException {
      this.response = response;
      this.start =
          response.getStatusCode().isError()
              ? response.getBody().readNBytes(RefusedToken.LONGEST_BODY + 1)
              : new byte[0];
    }

    Optional<String> refusal() throws IOException {
      return RefusedToken.code(response.getStatusCode().value(), start);
    }

    @Override
    public InputStream getBody() throws IOException {
      return start.length == 0
          ? response.getBody()
          : new SequenceInputStream(new ByteArrayInputStream(start), response.getBody());
    }

    @Override
    public HttpStatusCode getStatusCode() throws IOException {
      return response.getStatusCode();
    }

    @Override
    public String getStatusText() throws IOException {
      return response.getStatusText();
    }

    @Override
    public HttpHeaders getHeaders() {
      return response.getHeaders();
    }

    @Override
    public void close() {
      response.close();
    }
  }
}
