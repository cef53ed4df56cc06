package io.github.tokenbroker.client.spring;

import io.github.tokenbroker.client.RefusedToken;
import io.github.tokenbroker.client.Token;
import io.github.tokenbroker.client.TokenClient;
import java.io.ByteArrayInputStream;
import java.io.ByteArrayOutputStream;
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
    private final ByteArrayOutputStream start = new ByteArrayOutputStream();

    /** Why no more could be read, or null. The program gets it when it has read the start. */
    private IOException failure;

    Answer(ClientHttpResponse response) throws IOException {
      this.response = response;
      if (response.getStatusCode().isError()) {
        try {
          readStart(response.getBody());
        } catch (IOException broken) {
          failure = broken;
        }
      }
    }

    private void readStart(InputStream body) throws IOException {
      byte[] part = new byte[8192];
      int size = body.read(part);
      while (size >= 0) {
        start.write(part, 0, size);
        size = start.size() > RefusedToken.LONGEST_BODY ? -1 : body.read(part);
      }
    }

    Optional<String> refusal() throws IOException {
      return failure == null
          ? RefusedToken.code(response.getStatusCode().value(), start.toByteArray())
          : Optional.empty();
    }

    @Override
    public InputStream getBody() throws IOException {
      if (start.size() == 0 && failure == null) {
        return response.getBody();
      }
      return new SequenceInputStream(
          new ByteArrayInputStream(start.toByteArray()),
          failure == null ? response.getBody() : new Failing(failure));
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

  /** Fails when it is read. */
  private static final class Failing extends InputStream {
    private final IOException failure;

    Failing(IOException failure) {
      this.failure = failure;
    }

    @Override
    public int read() throws IOException {
      throw failure;
    }

    @Override
    public int read(byte[] bytes, int offset, int length) throws IOException {
      throw failure;
    }
  }
}
