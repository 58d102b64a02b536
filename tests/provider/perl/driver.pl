#!/usr/bin/perl -T

# Calls the methods of the plugin as Proxmox VE does, one JSON document a line: {"on": "provider" or "storage", "call":
# NAME, "args": [...]}. The first line says with what. The answer is {"result": [...]} or {"died": TEXT}, with "log".

use strict;
use warnings;

use JSON::PP;
use POSIX ();
use Scalar::Util qw(tainted);
use PVE::Storage::Custom::FleecePlugin;

my $json = JSON::PP->new->utf8->allow_nonref;
$| = 1;
# Proxmox VE's workers die on these.
$SIG{$_} = sub { die "interrupted by signal\n" } for qw(INT TERM QUIT HUP);

sub untainted { my ($text) = @_; return $text =~ m/\A(.*)\z/s ? $1 : undef }

my $setup = $json->decode(scalar(<STDIN>));
@PVE::Fleece::Process::COMMAND = map { untainted($_) } @{ $setup->{command} };
%PVE::Fleece::Process::ENVIRONMENT = map { untainted($_) } %{ $setup->{environment} };
for my $name (keys(%{ $setup->{limits} // {} })) {
    no strict 'refs';
    ${"PVE::Fleece::Process::$name"} = $setup->{limits}->{$name};
}
$SIG{CHLD} = 'IGNORE' if $setup->{reaped}; # then nobody can wait for a child
my ($scfg, $storeid) = @$setup{qw(scfg storeid)};
my $storage = 'PVE::Storage::Custom::FleecePlugin';
my @log;
my $provider = $storage->new_backup_provider($scfg, $storeid, sub { push @log, [@_] });
my @kept; # handles that stay open

while (defined(my $line = <STDIN>)) {
    my $asked = $json->decode($line);
    @log = ();
    my @result = eval { $asked->{forked} ? forked($asked) : done($asked) };
    # What a caller uses in a system call must not be tainted.
    my $answer = $@ ? { died => "$@" } : { result => \@result };
    print $json->encode({ %$answer, log => \@log }), "\n";
}

sub done {
    my ($asked) = @_;
    my ($call, @args) = ($asked->{call}, @{ $asked->{args} });
    die "no such method: $call\n" if $call !~ m/\A(\w+)\z/;
    my $method = $1;
    if ($method eq 'close_handles') {
        @kept = ();
        return;
    }
    if ($asked->{on} eq 'storage') {
        return $storage->$method(map { defined($_) && !ref($_) && $_ eq '@scfg' ? $scfg : $_ } @args);
    }
    if ($method eq 'backup_vm') {
        handed($_) for values(%{ $args[2] });
    }
    utf8::encode($args[1]) if $method =~ m/\Abackup_(?:vm|container)\z/; # files are bytes
    my @result = $provider->$method(@args);
    check_untainted($_) for @result;
    return map { defined($_) && !ref($_) && $method =~ m/config\z/ ? utf8_text($_) : $_ } @result;
}

sub utf8_text { my ($text) = @_; utf8::decode($text); return $text }

sub check_untainted {
    my ($value) = @_;
    if (ref($value) eq 'HASH') {
        check_untainted($_) for values(%$value);
    } elsif (defined($value) && !ref($value)) {
        die "the result is tainted: $value\n" if tainted($value);
    }
    return;
}

# `file` and `regions` as the hypervisor hands them over.
sub handed {
    my ($volume) = @_;
    my $path = delete($volume->{file}) // return;
    my $mode = delete($volume->{mode}) // '+<';
    open(my $handle, untainted($mode), untainted($path)) or die "open $path: $!\n";
    push @kept, $handle;
    $volume->{'file-handle'} = $handle;
    my @regions = @{ delete($volume->{regions}) // [] };
    $volume->{'next-dirty-region'} = sub { my $next = shift(@regions) // return undef; return @$next };
    return;
}

# As in the container's user namespace: in a fork, whose changes are lost.
sub forked {
    my ($asked) = @_;
    pipe(my $go_out, my $go) or die;
    pipe(my $ready, my $ready_in) or die;
    pipe(my $told, my $tell) or die;
    my $pid = fork() // die "fork: $!\n";
    if (!$pid) {
        @log = ();
        my @result = eval {
            my ($unshare, $new_user) = ((POSIX::uname())[4] eq 'x86_64' ? 272 : 97, 0x10000000);
            die "unshare: $!\n" if syscall($unshare, $new_user) != 0;
            syswrite($ready_in, '1');
            sysread($go_out, my $byte, 1);
            POSIX::setgid(0);
            POSIX::setuid(0);
            done($asked);
        };
        my $answer = $@ ? { died => "$@" } : { result => \@result };
        print $tell $json->encode({ %$answer, log => \@log });
        close($tell);
        POSIX::_exit(0);
    }
    close($tell);
    sysread($ready, my $byte, 1);
    for my $map (qw(uid_map gid_map)) {
        open(my $file, '>', "/proc/$pid/$map") or die "$map: $!\n";
        syswrite($file, "0 $asked->{forked} 65536\n") or die "$map: $!\n";
        close($file);
    }
    syswrite($go, '1');
    my $text = do { local $/; <$told> };
    waitpid($pid, 0);
    die "the fork said nothing\n" if !length($text // '');
    my $answer = $json->decode($text);
    push @log, @{ $answer->{log} };
    die $answer->{died} if defined($answer->{died});
    return @{ $answer->{result} };
}
