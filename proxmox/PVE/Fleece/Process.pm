package PVE::Fleece::Process;

# Runs `fleece provider ...`: JSON to its standard input, JSON from its standard output, all of it bounded in size and
# time. What a process is told never stands on its command line. docs/proxmox-provider.md has the protocol.
#
#   my $found = PVE::Fleece::Process::call('storage-status', { storage => ... });        one question
#   my $session = PVE::Fleece::Process->start(log => sub { my ($level, $message) = @_; ... });
#   my $answer = $session->ask('backup-init', { ... });                                  one after the other
#   $session->end();
#
# Every failure dies with a sentence that ends in a newline.

use strict;
use warnings;

use Errno qw(EAGAIN EINTR);
use Fcntl qw(F_GETFL F_SETFD F_SETFL O_NONBLOCK);
use MIME::Base64 ();
use POSIX qw(WNOHANG);
use Socket qw(AF_UNIX PF_UNSPEC SOCK_STREAM);
use Time::HiRes qw(clock_gettime CLOCK_MONOTONIC);

# The program and its first arguments, and what its environment has besides PATH, HOME and LANG.
our @COMMAND = ('/usr/bin/fleece');
our %ENVIRONMENT;

# Seconds: for one question; without any sign of life; to end by itself, and after SIGTERM.
our $CALL_LIMIT_S = 120;
our $SILENCE_LIMIT_S = 120;
our $END_LIMIT_S = 60;
our $TERM_LIMIT_S = 10;

# Bytes: of one line or document that is read, and of what is kept of standard error.
our $MAX_ANSWER = 64 << 20;
my $MAX_SAID = 64 << 10;

# The descriptor that a session gets its end of the stream of a container's files as.
my $STREAM_FD = 3;

my $serial = 0;

my $json;

sub json {
    # Proxmox VE has JSON (with JSON::XS), plain Perl JSON::PP.
    $json //= (eval { require JSON; 1 } ? 'JSON' : do { require JSON::PP; 'JSON::PP' })->new->utf8->canonical;
    return $json;
}

# A boolean of JSON.
sub boolean { my ($value) = @_; return json()->decode($value ? '[true]' : '[false]')->[0] }

# Texts of Proxmox VE are bytes or characters. They go as base64 of bytes, so that what is stored is what was there.
sub packed {
    my ($text) = @_;
    return undef if !defined($text);
    utf8::encode($text) if utf8::is_utf8($text);
    return MIME::Base64::encode_base64($text, '');
}

sub unpacked {
    my ($text, $what) = @_;
    return undef if !defined($text);
    die "fleece: the answer has no $what\n"
        if ref($text) || $text !~ m{\A((?:[A-Za-z0-9+/]{4})*(?:[A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?)\z};
    # What comes from outside is tainted until it was looked at: this is any text.
    my ($data) = MIME::Base64::decode_base64($1) =~ m/\A(.*)\z/s;
    return $data;
}

# Parts of an answer, looked at before they are used: die if they are not what they must be.

sub number_in {
    my ($answer, $key) = @_;
    my $value = ref($answer) eq 'HASH' ? $answer->{$key} : undef;
    die "fleece: the answer has no number '$key'\n" if !defined($value) || ref($value) || $value !~ m/\A(\d{1,18})\z/;
    return int($1);
}

sub text_in {
    my ($answer, $key, $pattern) = @_;
    my $value = ref($answer) eq 'HASH' ? $answer->{$key} : undef;
    die "fleece: the answer has no usable '$key'\n"
        if !defined($value) || ref($value) || $value !~ m/\A($pattern)\z/;
    return $1;
}

sub part_of {
    my ($answer, $key, $kind) = @_;
    my $value = ref($answer) eq 'HASH' ? $answer->{$key} : undef;
    die "fleece: the answer has no '$key'\n" if ref($value) ne $kind;
    return $value;
}

# One question, in a process of its own.
sub call {
    my ($name, $parameters, %options) = @_;
    my $self = __PACKAGE__->_spawn(['provider', 'call', $name, '--output', 'json'], %options);
    $self->{what} = "fleece provider call $name";
    my $limit_s = $options{limit} // $CALL_LIMIT_S;
    my $limit = clock_gettime(CLOCK_MONOTONIC) + $limit_s;
    my $answer = eval {
        $self->{pending} = json()->encode($parameters);
        $self->{close_when_sent} = 1;
        while (!$self->{out_ended}) {
            die "$self->{what}: no answer in $limit_s seconds\n" if clock_gettime(CLOCK_MONOTONIC) >= $limit;
            $self->_exchange($limit);
        }
        my $status = $self->_wait($limit);
        die "$self->{what}: it did not end in $limit_s seconds\n" if !defined($status);
        # -1: somebody else has waited for it. Who fails says nothing on standard output.
        die $self->_failure($status) if $status != 0 && $status != 3 << 8 && ($status > 0 || !length($self->{received}));
        my $decoded = eval { json()->decode($self->{received}) };
        die "$self->{what}: its answer is no JSON\n" if ref($decoded) ne 'HASH' && ref($decoded) ne 'ARRAY';
        $decoded;
    };
    my $error = $@;
    $self->kill();
    die $error if $error;
    return $answer;
}

# A process that answers one question after the other until its standard input is closed, or until this one is gone.
#
#   log => sub { my ($level, $message) = @_ }
#   stream => 1     a second way into it, for the files of a container: see `archive`
sub start {
    my ($class, %options) = @_;
    my @stream = $options{stream} ? ('--stream-fd', $STREAM_FD) : ();
    my $self = $class->_spawn(['provider', 'session', '--output', 'json', @stream], %options);
    $self->{what} = 'fleece provider session';
    return $self;
}

# Ask a session. It has to show that it is alive; how long the work takes is its affair, unless there is a `limit`.
sub ask {
    my ($self, $call, $parameters, %options) = @_;
    die "$self->{what}: $self->{unusable}\n" if $self->{unusable};
    my $id = "$$-" . ++$serial;
    # If this is left by a signal's handler, the answer that comes is not that to the next question.
    $self->{unusable} = "the call $call was interrupted";
    my $limit = $options{limit} ? clock_gettime(CLOCK_MONOTONIC) + $options{limit} : undef;
    my $answer = eval {
        $self->{pending} .= json()->encode({ id => $id, call => $call, parent => $$, parameters => $parameters }) . "\n";
        $self->_answer($id, $limit, $options{watch});
    };
    if (my $error = $@) {
        if (ref($error) eq 'HASH') { # the session said no, and is as usable as before
            $self->{unusable} = undef;
            die "$error->{text}\n";
        }
        $self->kill();
        $self->{unusable} = 'it was ended after a failure';
        die $error;
    }
    $self->{unusable} = undef;
    return $answer;
}

sub _answer {
    my ($self, $id, $limit, $watch) = @_;
    my $heard = clock_gettime(CLOCK_MONOTONIC);
    while (1) {
        while ($self->{received} =~ s/\A([^\n]*)\n//) {
            $heard = clock_gettime(CLOCK_MONOTONIC);
            my $message = eval { json()->decode($1) };
            die "$self->{what}: what it says is no JSON\n" if ref($message) ne 'HASH';
            if (ref($message->{log}) eq 'HASH') {
                $self->_log($message->{log}->{level}, $message->{log}->{message});
            } elsif (defined($message->{id}) && !ref($message->{id}) && $message->{id} eq $id) {
                die { text => _error_text($message->{error}) } if exists($message->{error});
                die "$self->{what}: its answer has no result\n" if ref($message->{result}) ne 'HASH';
                return $message->{result};
            } elsif (!$message->{alive}) {
                die "$self->{what}: it answers what was not asked\n";
            }
        }
        if ($self->{out_ended}) {
            my $status = $self->_wait(clock_gettime(CLOCK_MONOTONIC) + $TERM_LIMIT_S);
            die $self->_failure($status);
        }
        my $now = clock_gettime(CLOCK_MONOTONIC);
        die "$self->{what}: no sign of life for $SILENCE_LIMIT_S seconds\n" if $now >= $heard + $SILENCE_LIMIT_S;
        die "$self->{what}: no answer in time\n" if defined($limit) && $now >= $limit;
        $watch->() if $watch;
        $self->_exchange($heard + $SILENCE_LIMIT_S);
    }
}

# End a session: it is told by the end of its input, and cleans up.
sub end {
    my ($self) = @_;
    return if !$self->{pid};
    close(delete($self->{in})) if $self->{in};
    $self->{pending} = '';
    $self->{unusable} //= 'it was ended';
    my $limit = clock_gettime(CLOCK_MONOTONIC) + $END_LIMIT_S;
    eval {
        while (!$self->{out_ended} && clock_gettime(CLOCK_MONOTONIC) < $limit) {
            $self->_exchange($limit);
            $self->_log_lines();
        }
        $self->_wait($limit);
    };
    my $error = $@;
    $self->kill();
    die $error if $error;
    return;
}

# End it now: with SIGTERM, which lets it clean up, then with SIGKILL. Does nothing if it has ended.
sub kill {
    my ($self) = @_;
    local ($?, $!, $@);
    # What it still says is of no use, and must not come in the way.
    for my $which (qw(in out err)) {
        close(delete($self->{$which})) if $self->{$which};
    }
    $self->{out_ended} = 1;
    for my $signal (qw(TERM KILL)) {
        last if !$self->{pid};
        # It is the leader of a group of its own, with what it has started.
        CORE::kill($signal, -$self->{pid}, $self->{pid});
        $self->_wait(clock_gettime(CLOCK_MONOTONIC) + $TERM_LIMIT_S);
    }
    return;
}

# Run the walk over a container's files, in this process's own user namespace, beside the call `ask` of the session that
# takes what comes.
sub archive {
    my ($self, $call, $parameters, $walk) = @_;
    die "$self->{what}: it has no stream\n" if !$self->{stream};
    my $walker = __PACKAGE__->_spawn(
        ['provider', 'archive', '--output', 'json'], log => $self->{log}, stdout => $self->{stream},
    );
    $walker->{what} = 'fleece provider archive';
    my $answer = eval {
        $walker->{pending} = json()->encode($walk);
        $walker->{close_when_sent} = 1;
        my $done;
        my $watch = sub {
            return if $done;
            $walker->_exchange(0);
            my $status = $walker->_wait(0);
            return if !defined($status);
            die $walker->_failure($status) if $status > 0; # else the session knows whether all has come
            $done = 1;
        };
        $self->ask($call, $parameters, watch => $watch);
    };
    my $error = $@;
    $walker->kill();
    die $error if $error;
    return $answer;
}

# --- below: processes and their descriptors ---------------------------------------------------------------------------

sub _spawn {
    my ($class, $arguments, %options) = @_;
    my $self = bless {
        owner => $$, log => $options{log} // sub { }, pending => '', received => '', said => '', what => 'fleece',
    }, $class;
    pipe(my $child_in, my $in) or die "fleece: pipe: $!\n";
    pipe(my $out, my $child_out) or die "fleece: pipe: $!\n";
    pipe(my $err, my $child_err) or die "fleece: pipe: $!\n";
    my $child_stream;
    if ($options{stream}) {
        socketpair($child_stream, $self->{stream}, AF_UNIX, SOCK_STREAM, PF_UNSPEC) or die "fleece: socketpair: $!\n";
    }
    if ($options{stdout}) {
        close($out);
        $child_out = $options{stdout};
    }

    my $pid = fork();
    die "fleece: fork: $!\n" if !defined($pid);
    if (!$pid) {
        eval {
            POSIX::setsid();
            # What is ignored would stay so in the new program.
            $SIG{$_} = 'DEFAULT' for qw(HUP INT QUIT TERM PIPE CHLD ALRM USR1 USR2);
            POSIX::dup2(fileno($child_in), 0);
            POSIX::dup2(fileno($child_out), 1);
            POSIX::dup2(fileno($child_err), 2);
            if ($child_stream) {
                # All others of Perl's above 2 are closed by exec.
                if (fileno($child_stream) == $STREAM_FD) {
                    fcntl($child_stream, F_SETFD, 0);
                } else {
                    POSIX::dup2(fileno($child_stream), $STREAM_FD);
                }
            }
            %ENV = (
                PATH => '/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin',
                HOME => '/root',
                LANG => 'C.UTF-8',
                %ENVIRONMENT,
            );
            chdir('/');
            no warnings 'exec';
            exec { $COMMAND[0] } @COMMAND, @$arguments;
        };
        my $why = "fleece: cannot run $COMMAND[0]: $!\n";
        POSIX::write(2, $why, length($why));
        POSIX::_exit(127);
    }

    $self->{pid} = $pid;
    close($child_in);
    close($child_out) if !$options{stdout};
    close($child_err);
    close($child_stream) if $child_stream;
    $self->{in} = _unblocked($in);
    $self->{err} = _unblocked($err);
    if ($options{stdout}) {
        $self->{out_ended} = 1;
    } else {
        $self->{out} = _unblocked($out);
    }
    return $self;
}

sub _unblocked {
    my ($handle) = @_;
    my $flags = fcntl($handle, F_GETFL, 0);
    fcntl($handle, F_SETFL, $flags | O_NONBLOCK) or die "fleece: fcntl: $!\n";
    return $handle;
}

# Write what is pending and read what there is, waiting for either until `limit`, but not longer than half a second.
sub _exchange {
    my ($self, $limit) = @_;
    my ($readable, $writable) = ('', '');
    for my $handle ($self->{out}, $self->{err}) {
        vec($readable, fileno($handle), 1) = 1 if $handle;
    }
    vec($writable, fileno($self->{in}), 1) = 1 if $self->{in} && length($self->{pending});
    my $wait = $limit - clock_gettime(CLOCK_MONOTONIC);
    $wait = $wait > 0.5 ? 0.5 : $wait < 0 ? 0 : $wait;
    return if select($readable, $writable, undef, $wait) < 0; # a signal

    if ($self->{in} && length($self->{pending})) {
        local $SIG{PIPE} = 'IGNORE';
        my $count = syswrite($self->{in}, $self->{pending}, 1 << 16);
        if (defined($count)) {
            substr($self->{pending}, 0, $count, '');
        } elsif ($! != EAGAIN && $! != EINTR) {
            $self->{pending} = ''; # it is gone, and its output says why
        }
    }
    close(delete($self->{in})) if $self->{in} && $self->{close_when_sent} && !length($self->{pending});

    $self->{out_ended} = 1 if !$self->_read('out', \$self->{received}, $MAX_ANSWER);
    $self->_read('err', \$self->{said}, $MAX_SAID);
    die "$self->{what}: its answer is too long\n" if length($self->{received}) > $MAX_ANSWER;
    return;
}

# Read what there is of one output; false if it has ended.
sub _read {
    my ($self, $which, $into, $most) = @_;
    my $handle = $self->{$which} or return 0;
    for (1 .. 64) { # then what is to be written has its turn
        my $count = sysread($handle, my $data, 1 << 16);
        if (!defined($count)) {
            return 1 if $! == EAGAIN || $! == EINTR;
            $count = 0;
        }
        if (!$count) {
            close(delete($self->{$which}));
            return 0;
        }
        $$into .= $data;
        # Of what it says the end is of interest.
        $$into = substr($$into, -$most) if $which eq 'err' && length($$into) > $most;
        return 1 if length($$into) > $most;
    }
    return 1;
}

# How it ended, as in $?; undef if it has not until `limit`. -1 if somebody else has waited for it.
sub _wait {
    my ($self, $limit) = @_;
    return $self->{status} if !$self->{pid};
    while (1) {
        local $?;
        my $found = waitpid($self->{pid}, WNOHANG);
        # A process of another one (a fork's parent) cannot be waited for.
        if ($found == $self->{pid} || $found < 0 && $self->{owner} == $$) {
            $self->{status} = $found < 0 ? -1 : $?;
            $self->{pid} = undef;
            eval { $self->_exchange(0) }; # its last words
            return $self->{status};
        }
        return undef if $found < 0 || clock_gettime(CLOCK_MONOTONIC) >= $limit;
        if ($self->{out} || $self->{err}) {
            $self->_exchange($limit);
            Time::HiRes::sleep(0.01);
        } else {
            Time::HiRes::sleep(0.02);
        }
    }
}

sub _failure {
    my ($self, $status) = @_;
    my $how = !defined($status) ? 'it does not answer any more'
        : $status < 0 ? 'it has ended'
        : $status & 127 ? 'it was ended by signal ' . ($status & 127)
        : 'it ended with ' . ($status >> 8);
    my @lines = grep { m/\S/ } split(/\n/, $self->{said});
    my ($document) = grep { ref($_) eq 'HASH' && exists($_->{error}) } map { eval { json()->decode($_) } } reverse(@lines);
    return _error_text($document->{error}) . "\n" if $document;
    return "$self->{what}: $how" . (@lines ? ': ' . _shown($lines[-1]) : '') . "\n";
}

# An error as fleece writes it, in a sentence.
sub _error_text {
    my ($error) = @_;
    return 'fleece: it failed, and does not say why' if ref($error) ne 'HASH';
    my ($what, $where, $why, $hint) =
        map { defined($error->{$_}) && !ref($error->{$_}) ? $error->{$_} : '' } qw(what where why hint);
    my $text = "cannot $what" . (length($where) ? " $where" : '') . ": $why" . (length($hint) ? "; $hint" : '');
    return _shown($text);
}

# A text for a log: bytes, on one line, with nothing in it that a terminal would act on.
sub _shown {
    my ($text) = @_;
    $text =~ s/[\x00-\x1f\x7f-\x9f]+/ /g if utf8::is_utf8($text);
    $text =~ s/[\x00-\x1f\x7f]+/ /g;
    $text = substr($text, 0, 4000);
    utf8::encode($text) if utf8::is_utf8($text);
    return $text;
}

sub _log {
    my ($self, $level, $message) = @_;
    return if !defined($message) || ref($message);
    $level = 'info' if !defined($level) || $level !~ m/\A(?:info|warn|err)\z/;
    $self->{log}->($level, _shown($message));
    return;
}

# What a session that ends has still to say.
sub _log_lines {
    my ($self) = @_;
    while ($self->{received} =~ s/\A([^\n]*)\n//) {
        my $message = eval { json()->decode($1) };
        $self->_log($message->{log}->{level}, $message->{log}->{message})
            if ref($message) eq 'HASH' && ref($message->{log}) eq 'HASH';
    }
    return;
}

sub DESTROY {
    my ($self) = @_;
    # Of a fork the process is the parent's.
    return if !$self->{pid} || $self->{owner} != $$;
    local ($?, $!, $@);
    eval { $self->kill() };
    return;
}

1;
